"""Plain weights on the wire: any safetensors reader takes the file, and ours takes nothing else."""

import math
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker.proto.v1 import federation_pb2
from tg_tinker.types import AdapterWeights, LoRAConfig, WeightsSource
from tg_tinker.types.federation import EVENTS, LARGEST_WEIGHTS_BYTES, REASONS, check_note
from tg_tinker.wire import federation

JOB = "0f" * 32
SOURCE = WeightsSource(job=JOB, round=2, epsilon=1.5, delta=1e-6, unit="user")
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
NAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,30}", fullmatch=True)


@st.composite
def tensors(draw):
    found = {}
    for name in draw(st.lists(NAMES, max_size=4, unique=True)):
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        values = draw(st.lists(FINITE, min_size=math.prod(shape), max_size=math.prod(shape)))
        found[name] = np.array(values, dtype=np.float32).reshape(shape)
    return found


def same(one, other):
    assert set(one) == set(other)
    for name, array in one.items():
        assert array.dtype == other[name].dtype == np.float32
        assert array.shape == other[name].shape
        assert array.tobytes() == other[name].tobytes()


@given(tensors(), st.integers(0, 2**40))
def test_weights_survive_the_wire_bit_for_bit(given_, step):
    chunks = [
        federation_pb2.WeightsChunk.FromString(c.SerializeToString())
        for c in federation.weights_to_proto(AdapterWeights(tensors=given_, step=step))
    ]
    back = federation.weights_from_proto(chunks)
    assert back.step == step
    same(given_, back.tensors)
    file = b"".join(c.data for c in chunks[1:])
    assert len(file) == chunks[0].head.size_bytes
    same(given_, safetensors.numpy.load(file))  # a second reader


@given(tensors())
def test_an_import_says_its_size_and_carries_what_another_reader_reads(given_):
    first, *rest = federation.import_weights(
        given_, base_model="tiny", lora_config=LoRAConfig(rank=3), step=4, source=SOURCE
    )
    new = federation.new_weights_from_proto(first.head)
    assert (new.base_model, new.lora_config, new.step, new.source) == ("tiny", LoRAConfig(rank=3), 4, SOURCE)
    file = b"".join(r.data for r in rest)
    assert len(file) == new.size_bytes
    same(given_, safetensors.numpy.load(file))


def test_large_tensors_travel_in_pieces_of_a_mebibyte():
    weights = AdapterWeights(tensors={"w": np.arange(700_000, dtype=np.float32), "v": np.ones(2, np.float32)}, step=0)
    chunks = list(federation.weights_to_proto(weights))
    assert max(len(c.data) for c in chunks) == 2**20
    same(weights.tensors, federation.weights_from_proto(chunks).tensors)


def chunks_of(file, *, size=None, cut=50):
    head = federation_pb2.WeightsHead(step=1, size_bytes=len(file) if size is None else size)
    pieces = [federation_pb2.WeightsChunk(data=file[i : i + cut]) for i in range(0, len(file), cut)]
    return [federation_pb2.WeightsChunk(head=head), *pieces]


def file_of(arrays, metadata=None):
    return safetensors.numpy.save(arrays, metadata={"format": "pt"} if metadata is None else metadata)


WHOLE = file_of({"w": np.arange(4, dtype=np.float32)})


@pytest.mark.parametrize(
    "chunks",
    [
        [],
        chunks_of(WHOLE)[1:],
        chunks_of(WHOLE)[:-1],
        chunks_of(WHOLE, size=len(WHOLE) - 1),
        chunks_of(WHOLE, size=len(WHOLE) + 1),
        chunks_of(WHOLE, size=0),
        chunks_of(WHOLE, size=-1),
        chunks_of(WHOLE, size=LARGEST_WEIGHTS_BYTES + 1),
        chunks_of(bytes(100)),
        chunks_of((2**50).to_bytes(8, "little") + bytes(100)),
        chunks_of(file_of({"w": np.zeros(4)})),
        chunks_of(file_of({"w": np.array([1, math.nan], np.float32)})),
        chunks_of(file_of({"w": np.array([1, math.inf], np.float32)})),
    ],
    ids=range(13),
)
def test_what_is_no_file_of_weights_is_refused(chunks):
    with pytest.raises(ServerError, match="cannot be used"):
        federation.weights_from_proto(chunks)


def test_a_server_that_sends_on_and_on_is_stopped_at_the_size_it_said():
    taken = []

    def on_and_on():
        yield from chunks_of(WHOLE)
        for _ in range(1000):
            taken.append(1)
            yield federation_pb2.WeightsChunk(data=b"x")

    with pytest.raises(ServerError, match="longer"):
        federation.weights_from_proto(on_and_on())
    assert len(taken) == 1


@pytest.mark.parametrize("field", ["kind", "job", "round", "epsilon", "delta", "unit"])
def test_a_source_that_cannot_be_is_refused_by_name(field):
    bad = {
        "kind": ["", "site"],
        "job": ["", "0F" * 32, "0f" * 31, JOB + "\n", 7],
        "round": [-1, 1.0, True, 10**9 + 1],
        "epsilon": [-0.1, math.nan, "1", None, True],
        "delta": [0.0, 1.0, -1.0, math.nan],
        "unit": ["", "people"],
    }
    for value in bad[field]:
        with pytest.raises(InvalidRequestError) as caught:
            replace(SOURCE, **{field: value})
        assert caught.value.field == f"source.{field}"
    assert replace(SOURCE, epsilon=math.inf, round=0).dataset_id == "federation:" + JOB


def test_a_note_takes_listed_values_only():
    for event in EVENTS:
        check_note(event, JOB, 3, "")
    for reason in REASONS:
        check_note("join_refused", JOB, 0, reason)
        with pytest.raises(InvalidRequestError):
            check_note("round_trained", JOB, 0, reason)
    for bad, field in (
        (("a site said no", JOB, 0, ""), "event"),
        (("join_refused", "my job", 0, ""), "job"),
        (("join_refused", JOB, -1, ""), "round"),
        (("join_refused", JOB, 0, "Mrs Example"), "reason"),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            check_note(*bad)
        assert caught.value.field == field


def test_every_reason_of_a_refusal_may_be_noted():
    from tg_tinker.errors import FederationRefusedError

    documented = {r.strip('`"') for r in FederationRefusedError.__doc__.split("``") if r.startswith('"')}
    assert documented == REASONS

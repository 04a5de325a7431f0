import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tg_tinker.errors import InvalidRequestError
from tg_tinker.proto.v1 import runs_pb2, training_pb2
from tg_tinker.types import BatchData, batch_digest
from tg_tinker.types.optim import AdamParams
from tg_tinker.types.sampling import GenerationOptions
from tg_tinker.wire.call_messages import call_from_proto, call_to_proto, position_from_proto, position_to_proto
from tg_tinker.wire.calls import (
    MAX_TTL_S,
    Generate,
    Load,
    Pass,
    Position,
    Save,
    Step,
    Updates,
)
from tg_tinker.wire.tensors import tensor_to_proto

HERE = Position(run_id="run_1", seq=7, handle="h")
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | TEXT,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(TEXT, children, max_size=3),
    max_leaves=6,
)


@st.composite
def passes(draw):
    records, tokens = draw(st.integers(0, 4)), draw(st.integers(0, 5))
    ids = np.array(draw(st.lists(st.integers(0, 2**62), min_size=records * tokens, max_size=records * tokens)))
    shape = (records, tokens)
    batch = BatchData(
        input_ids=ids.astype(np.int64).reshape(shape),
        attention_mask=np.ones(shape, dtype=np.int64) if draw(st.booleans()) else None,
        labels=np.full(shape, -100) if draw(st.booleans()) else None,
    )
    units = draw(st.none() | st.lists(TEXT, min_size=records, max_size=records).map(tuple)) or None
    return Pass(
        batch=batch,
        train=draw(st.booleans()),
        units=units,
        batch_hash=draw(st.none() | TEXT.filter(bool)),
    )


PARAMS = st.builds(
    GenerationOptions,
    max_tokens=st.integers(1, 2**40),
    temperature=st.floats(0, 10),
    top_p=st.floats(0.01, 1),
    top_k=st.none() | st.integers(0, 10**6),
    stop_sequences=st.lists(TEXT.filter(bool), max_size=3).map(tuple),
    repetition_penalty=st.floats(0.1, 10),
    presence_penalty=st.floats(-10, 10),
    frequency_penalty=st.floats(-10, 10),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
)
ADAM = st.builds(
    AdamParams,
    learning_rate=st.floats(0, 1),
    beta1=st.floats(0, 0.999),
    beta2=st.floats(0, 0.999),
    eps=st.floats(1e-12, 1),
    weight_decay=st.floats(0, 1),
    grad_clip_norm=st.floats(0, 10),
)
OTHERS = (
    st.builds(Step, apply_dp_noise=st.booleans(), incomplete=TEXT, adam=st.none() | ADAM)
    | st.builds(
        Save,
        include_optimizer=st.booleans(),
        metadata=st.dictionaries(TEXT, JSON, max_size=3),
        name=TEXT,
        kind=st.sampled_from(["state", "sampler", "external"]),
        ttl_seconds=st.none() | st.integers(1, MAX_TTL_S),
        overwrite=st.booleans(),
    )
    | st.builds(Load, artifact_id=TEXT, optimizer=st.none() | st.booleans())
    | st.builds(
        Generate,
        prompts=st.lists(TEXT, max_size=3).map(tuple),
        params=PARAMS,
        num_completions=st.integers(-5, 2**40),
    )
)


def through_the_wire(call):
    message = call_to_proto(call, HERE)
    return call_from_proto(type(message).FromString(message.SerializeToString()))


@given(passes())
def test_a_pass_survives_the_wire(call):
    back = through_the_wire(call)
    assert batch_digest(back.batch) == batch_digest(call.batch)
    assert dataclasses.replace(back, batch=None).__repr__() == dataclasses.replace(call, batch=None).__repr__()


@given(st.integers(0, 4), st.integers(0, 5), st.randoms())
def test_updates_survive_the_wire_bit_for_bit(rows, size, random):
    vectors_UP = np.frombuffer(random.randbytes(4 * rows * size), dtype=np.float32).reshape(rows, size)  # NaN too
    call = Updates(vectors_UP=vectors_UP, units=tuple(f"u{i}" for i in range(rows)))
    back = through_the_wire(call)
    assert (back.units, back.vectors_UP.shape, back.digest()) == (call.units, (rows, size), call.digest())
    assert back.vectors_UP.tobytes() == vectors_UP.tobytes()


@given(OTHERS)
def test_every_other_call_survives_the_wire(call):
    assert through_the_wire(call) == call


@given(st.builds(Position, run_id=TEXT, seq=st.integers(0, 2**64 - 1), handle=TEXT))
def test_a_position_survives_the_wire(position):
    assert position_from_proto(position_to_proto(position)) == position


def test_metadata_that_is_not_json_is_refused_by_name():
    for metadata in ({"f": object()}, {"t": {1, 2}}, [1]):
        with pytest.raises(InvalidRequestError) as caught:
            call_to_proto(Save(metadata=metadata), HERE)
        assert caught.value.field == "metadata"


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (training_pb2.ForwardBackwardRequest(mode=1), "batch.input_ids"),
        (training_pb2.ForwardBackwardRequest(), "mode"),
        (training_pb2.SaveStateRequest(metadata_json="[1]"), "metadata"),
        (training_pb2.AddUpdatesRequest(), "vectors"),
        (training_pb2.AddUpdatesRequest(vectors=tensor_to_proto(np.zeros((1, 2)))), "vectors"),
        (training_pb2.AddUpdatesRequest(vectors=tensor_to_proto(np.zeros(2, np.float32))), "vectors"),
        (training_pb2.SaveStateRequest(metadata_json="{"), "metadata"),
    ],
)
def test_a_request_that_cannot_be_is_refused_by_name(request_, field):
    with pytest.raises(InvalidRequestError) as caught:
        call_from_proto(request_)
    assert caught.value.field == field


def test_a_message_that_is_no_call_is_a_programming_error():
    with pytest.raises(TypeError, match="GetFutureRequest"):
        call_from_proto(runs_pb2.GetFutureRequest())

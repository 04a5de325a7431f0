import contextlib
import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from tg_tinker.errors import InvalidRequestError
from tg_tinker.proto.v1 import training_pb2
from tg_tinker.types.datum import Datum, EncodedTextChunk, ModelInput, TensorData
from tg_tinker.types.losses import LOSSES, Loss
from tg_tinker.types.results import ForwardBackwardOutput
from tg_tinker.wire.call_messages import call_from_proto, call_to_proto
from tg_tinker.wire.calls import LossPass, Position
from tg_tinker.wire.datums import MAX_DATUMS, data_digest, datum_from_bytes, datum_to_bytes
from tg_tinker.wire.results import forward_backward_from_proto, forward_backward_to_proto

HERE = Position(run_id="run_1", seq=7, handle="h")
TOKEN = st.integers(-(2**63), 2**63 - 1)
NAME = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)


@st.composite
def dense(draw):
    dtype = draw(st.sampled_from(["int64", "float32"]))
    shape = draw(array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    return TensorData(draw(arrays(np.dtype(dtype), shape)), dtype=dtype)


@st.composite
def sparse(draw):
    array = draw(arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=5), elements=st.floats(width=32)))
    mask = draw(arrays(bool, array.shape))
    rows = [np.flatnonzero(row) for row in mask]
    return TensorData(
        np.concatenate([array[i, row] for i, row in enumerate(rows)]),
        dtype="float32",
        shape=array.shape,
        sparse_crow_indices=np.cumsum([0, *(len(row) for row in rows)]).tolist(),
        sparse_col_indices=np.concatenate(rows).tolist(),
    )


CHUNK = st.lists(TOKEN, max_size=4).map(lambda tokens: EncodedTextChunk(tokens=tokens))
DATUM = st.builds(
    Datum,
    st.lists(CHUNK, max_size=4).map(lambda chunks: ModelInput(chunks=chunks)),
    st.dictionaries(NAME, dense() | sparse(), max_size=4),
)


def parts(datum):
    """Everything in a datum, in values that compare."""
    tensors = {
        name: (t.dtype, t.shape, np.asarray(t.data).tobytes(), t.sparse_crow_indices, t.sparse_col_indices)
        for name, t in datum.loss_fn_inputs.items()
    }
    return [list(c.tokens) for c in datum.model_input.chunks], tensors


def datum_for(loss, length, rng, alternatives=None):
    kind = LOSSES[loss]
    shape = (length,) if alternatives is None else (length, alternatives)
    inputs = {name: TensorData(rng.normal(size=shape), dtype="float32") for name in kind.required + kind.optional}
    inputs["target_tokens"] = TensorData(rng.integers(0, 99, size=shape), dtype="int64")
    return Datum(ModelInput.from_ints(rng.integers(0, 99, size=length).tolist()), inputs)


@given(DATUM)
def test_reading_undoes_writing(datum):
    assert parts(datum_from_bytes(datum_to_bytes(datum))) == parts(datum)


@given(DATUM)
def test_writing_undoes_reading(datum):
    data = datum_to_bytes(datum)
    assert datum_to_bytes(datum_from_bytes(data)) == data


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("units", [None, ("a", "b", "a")])
def test_a_call_of_every_loss_comes_back_as_it_went(loss, train, units):
    rng = np.random.default_rng(0)
    data = tuple(datum_for(loss, n, rng) for n in (1, 5, 3))
    call = LossPass(data=data, loss=Loss.of(loss), train=train, units=units, coupling="batch")
    request = training_pb2.ForwardBackwardRequest.FromString(call_to_proto(call, HERE).SerializeToString())
    back = call_from_proto(request)
    assert (back.loss, back.train, back.units, back.coupling) == (call.loss, train, units, "batch")
    assert [parts(d) for d in back.data] == [parts(d) for d in data]


def test_settings_of_a_loss_and_alternatives_travel():
    data = (datum_for("cross_entropy", 4, np.random.default_rng(0), alternatives=3),)
    back = call_from_proto(call_to_proto(LossPass(data=data, loss=Loss.of("cross_entropy")), HERE))
    assert back.data[0].loss_fn_inputs["target_tokens"].shape == [4, 3]
    ppo = Loss.of("ppo", {"clip_low_threshold": 0.5})
    assert call_from_proto(call_to_proto(LossPass(data=(), loss=ppo), HERE)).loss == ppo
    custom = Loss.of("custom", {"loss_id": "loss_7"})
    assert call_from_proto(call_to_proto(LossPass(data=(), loss=custom), HERE)).loss == custom


def test_what_a_loss_cannot_be_computed_on_is_refused_on_reading():
    bad = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [1]})
    with pytest.raises(InvalidRequestError, match="weights"):
        call_from_proto(call_to_proto(LossPass(data=(bad,), loss=Loss.of("cross_entropy")), HERE))


@given(st.binary(max_size=60) | st.builds(lambda d, cut: datum_to_bytes(d)[:cut], DATUM, st.integers(0, 80)))
def test_garbage_is_the_callers_error(data):
    with contextlib.suppress(InvalidRequestError):  # and nothing else
        datum_from_bytes(data)


def int64(*values):
    return struct.pack(f"<{len(values)}q", *values)


M = 2**63 - 1
BAD_TENSORS = {
    "dtype": {"dtype": "float16", "shape": [1], "data": b"\0\0"},
    "too little data": {"dtype": "int64", "shape": [2], "data": bytes(8)},
    "a product that overflows": {"dtype": "int64", "shape": [2**62, 4, 1], "data": b""},
    "more than can be counted": {"dtype": "int64", "shape": [0, M], "data": b""},
    "a negative side": {"dtype": "int64", "shape": [-1, -1], "data": bytes(8)},
    "half a value": {"dtype": "float32", "shape": [1], "data": bytes(6)},
    "many dimensions": {"dtype": "float32", "shape": [1] * 100_000, "data": bytes(4)},
    "rows that overflow": {
        "dtype": "float32",
        "shape": [4, 2],
        "data": bytes(4),
        "crow_indices": int64(0, M, -M - 1, -1, 1),
        "col_indices": int64(0),
    },
    "rows that fall": {
        "dtype": "float32",
        "shape": [2, 2],
        "data": bytes(8),
        "crow_indices": int64(0, 2, 1),
        "col_indices": int64(0, 1),
    },
    "a column outside": {
        "dtype": "float32",
        "shape": [1, 2],
        "data": bytes(4),
        "crow_indices": int64(0, 1),
        "col_indices": int64(2),
    },
    "a sparse vector": {
        "dtype": "float32",
        "shape": [2],
        "data": bytes(4),
        "crow_indices": int64(0, 1),
        "col_indices": int64(0),
    },
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_a_tensor_that_cannot_be_is_refused_by_name(case):
    message = training_pb2.Datum(inputs=[training_pb2.LossTensor(name="weights", **BAD_TENSORS[case])])
    with pytest.raises(InvalidRequestError) as refused:
        datum_from_bytes(message.SerializeToString())
    assert "loss_fn_inputs" in refused.value.field


@pytest.mark.parametrize("lengths", [(3,), (1,), (1, -1, 2), (M, M, 4), ()])
def test_chunks_that_do_not_fit_are_refused(lengths):
    message = training_pb2.Datum(tokens=int64(5, 6), chunk_lengths=int64(*lengths))
    with pytest.raises(InvalidRequestError, match="chunks"):
        datum_from_bytes(message.SerializeToString())


def test_two_tensors_of_one_name_are_refused():
    tensor = training_pb2.LossTensor(name="a", dtype="int64", shape=[0])
    with pytest.raises(InvalidRequestError, match="one name"):
        datum_from_bytes(training_pb2.Datum(inputs=[tensor, tensor]).SerializeToString())


def test_a_request_is_datums_or_a_batch():
    request = call_to_proto(LossPass(data=(), loss=Loss.of("cross_entropy")), HERE)
    request.dataset_id = "d"
    with pytest.raises(InvalidRequestError, match="not both"):
        call_from_proto(request)


def test_more_datums_than_one_call_takes_are_refused_before_they_are_read():
    request = call_to_proto(LossPass(data=(), loss=Loss.of("cross_entropy")), HERE)
    request.datums.extend([b"garbage"] * (MAX_DATUMS + 1))
    with pytest.raises(InvalidRequestError, match="split"):
        call_from_proto(request)


def test_a_large_request_is_cheap_to_take_in():
    """Parsing the request, which the event loop does, reads no datum: they lie in it as bytes."""
    datum = datum_for("ppo", 256, np.random.default_rng(0))
    payload = call_to_proto(LossPass(data=(datum,) * 10, loss=Loss.of("ppo")), HERE).SerializeToString()
    taken = training_pb2.ForwardBackwardRequest.FromString(payload).datums
    assert [type(d) for d in taken] == [bytes] * 10
    assert len(set(taken)) == 1


def test_the_digest_is_of_the_content():
    """A second, independent writing of the digest; chunks make no difference, everything else does."""
    rng = np.random.default_rng(0)
    datum = datum_for("cross_entropy", 3, rng)

    def field(*parts):
        return b"".join(len(p).to_bytes(8, "little") + p for p in parts)

    ids = datum.model_input.to_ints()
    targets, weights = (datum.loss_fn_inputs[n].to_numpy().tobytes() for n in ("target_tokens", "weights"))
    expected = hashlib.sha256(
        b"tg-tinker/datums/v1\0"
        + field(b"datum:2", int64(*ids))
        + field(b"int64:3", b"target_tokens", b"", b"", targets)
        + field(b"float32:3", b"weights", b"", b"", weights)
    ).digest()
    assert data_digest([datum]) == expected
    chunked = Datum(
        ModelInput(chunks=[EncodedTextChunk(tokens=ids[:1]), EncodedTextChunk(tokens=ids[1:])]), datum.loss_fn_inputs
    )
    assert data_digest([chunked]) == expected
    seen = {expected, data_digest([]), data_digest([datum, datum])}
    seen.add(data_digest([Datum(datum.model_input, {**datum.loss_fn_inputs, "weights": [1, 2, 3]})]))
    seen.add(data_digest([Datum(ModelInput.from_ints([1, 2, 3]), datum.loss_fn_inputs)]))
    assert len(seen) == 5


def test_outputs_of_a_loss_travel():
    output = ForwardBackwardOutput(
        loss=1.0,
        batch_hash="",
        gradient_hash="",
        num_tokens=3,
        latency_ms=0.0,
        metrics={"loss:sum": float("inf")},
        loss_fn_output_type="ArrayRecord",
        loss_fn_outputs=[{"logprobs": TensorData([-1.0, float("nan")], dtype="float32")}, {}],
    )
    assert forward_backward_from_proto(forward_backward_to_proto(output)) == output

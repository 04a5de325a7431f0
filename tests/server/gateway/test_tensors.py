"""Datums and results survive the wire as the official client writes and reads it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tg_tinker.errors import InvalidRequestError
from tg_tinker.proto.v1 import gateway_pb2 as pb
from tg_tinker.types.datum import TensorData
from tg_tinker.types.tokens import SampledSequence, SampleResponse, TopkLogprobs
from tg_tinker_server.gateway import tensors
from tg_tinker_server.gateway.results import finite, pass_to_proto, sample_to_proto
from tg_tinker_server.gateway.tensors import DatumReader


def _csr(dense: Any, **changes: Any) -> pb.Tensor:
    array = np.asarray(dense, np.float32)
    rows, cols = np.nonzero(array)
    crow = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(array)))])
    parts = {"values": array[rows, cols].tobytes(), "crow_indices": crow.astype("<i8").tobytes()}
    parts |= {"col_indices": cols.astype("<i8").tobytes(), **changes}
    shape = parts.pop("shape", array.shape)
    return pb.Tensor(sparse_csr=pb.SparseCsr(**parts), dtype=pb.DTYPE_FLOAT32, shape=shape)


def test_every_dtype_becomes_one_of_two() -> None:
    values = np.asarray([1.5, -2.0, 0.0, 3.25], np.float32)
    bfloat16 = (values.view(np.uint32) >> 16).astype("<u2")
    cases = {
        pb.DTYPE_FLOAT32: (values.tobytes(), values),
        pb.DTYPE_BFLOAT16: (bfloat16.tobytes(), values),
        pb.DTYPE_INT64: (np.asarray([1, -(2**40)], "<i8").tobytes(), np.asarray([1, -(2**40)])),
        pb.DTYPE_INT32: (np.asarray([1, -2], "<i4").tobytes(), np.asarray([1, -2])),
    }
    for dtype, (data, expected) in cases.items():
        read = DatumReader().tensor("x", pb.Tensor(dense=data, dtype=dtype, shape=expected.shape))
        assert read.dtype == ("float32" if expected.dtype == np.float32 else "int64")
        np.testing.assert_array_equal(read.to_numpy(), expected)


def test_a_sparse_tensor_is_made_dense() -> None:
    dense = [[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, -3.0]]
    np.testing.assert_array_equal(DatumReader().tensor("w", _csr(dense)).to_numpy(), dense)


@pytest.mark.parametrize(
    "message",
    [
        _csr([[1.0, 2.0]], shape=[2**40, 2**40]),
        _csr([[1.0, 2.0]], shape=[1, 1]),
        _csr([[1.0, 2.0]], shape=[-1, 2]),
        _csr([[1.0, 2.0]], crow_indices=np.asarray([0, 5], "<i8").tobytes()),
        _csr([[1.0, 2.0]], crow_indices=b"123"),
        _csr([[1.0, 2.0]], col_indices=np.asarray([0, -1], "<i8").tobytes()),
        _csr([[1.0], [2.0]], crow_indices=np.asarray([0, 3, 2], "<i8").tobytes()),
        pb.Tensor(dense=b"1234567", dtype=pb.DTYPE_FLOAT32),
        pb.Tensor(dense=b"12345678", dtype=pb.DTYPE_FLOAT32, shape=[3]),
        pb.Tensor(dense=b"12345678", dtype=pb.DTYPE_FLOAT32, shape=[-2, -1]),
        pb.Tensor(dense=b"1234"),
    ],
)
def test_a_tensor_that_cannot_be_is_refused(message: pb.Tensor) -> None:
    with pytest.raises(InvalidRequestError):
        DatumReader().tensor("w", message)


def test_the_dense_tensors_of_a_request_have_a_limit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "MOST_ELEMENTS", 10)
    reader = DatumReader()
    reader.tensor("w", _csr([[1.0, 0.0, 0.0]] * 2))
    with pytest.raises(InvalidRequestError, match="over 10 values"):
        reader.tensor("w", _csr([[1.0, 0.0, 0.0]] * 2))


def test_the_official_client_reads_our_passes_and_both_descriptors_fit_into_one_process() -> None:
    from tinker.proto import response_conv

    outputs = [
        {"logprobs": TensorData.from_numpy(np.asarray([-1.0, -2.0], np.float32))},
        {"logprobs": TensorData.from_numpy(np.asarray([[-3.0, -4.0], [-5.0, np.nan]], np.float32))},
        {"logprobs": TensorData.from_numpy(np.zeros((0, 2), np.float32))},
    ]
    data = pass_to_proto(outputs, {"loss:sum": 2.5, "epsilon": 1.0, "a:b:sum": 1.0}).SerializeToString()
    read = response_conv.deserialize_forward_backward_output(data)
    assert read.metrics == {"loss:sum": 2.5}
    for ours, theirs in zip(outputs, read.loss_fn_outputs, strict=True):
        np.testing.assert_array_equal(ours["logprobs"].to_numpy(), theirs["logprobs"].to_numpy())


def test_the_official_client_reads_our_samples() -> None:
    from tinker.proto import response_conv

    def topk(rows: int, k: int) -> TopkLogprobs:
        ids = np.arange(1, rows * k + 1, dtype=np.int32).reshape(rows, k)
        return TopkLogprobs(token_ids=ids, logprobs=-ids.astype(np.float32))

    response = SampleResponse(
        sequences=[
            SampledSequence(stop_reason="stop", tokens=[5, 6], logprobs=[-0.5, -0.25], topk_logprobs=topk(2, 3)),
            SampledSequence(stop_reason="length", tokens=[], logprobs=[]),
        ],
        prompt_logprobs=[None, -1.0, -2.0],
        topk_prompt_logprobs=topk(3, 2),
        target_prompt_logprobs=np.asarray([[np.nan], [-7.0], [np.nan]], np.float32),
        prompt_alt_tokens=topk(3, 2),
        prompt_cache_hit_tokens=4,
    )
    read = response_conv.deserialize_sample_response(sample_to_proto(response).SerializeToString())
    assert [(s.stop_reason, list(s.tokens)) for s in read.sequences] == [("stop", [5, 6]), ("length", [])]
    assert read.sequences[0].topk_logprobs is not None
    assert read.prompt_logprobs == [None, -1.0, -2.0]
    assert read.target_prompt_logprobs.tolist() == [[-7.0], [0.0]]
    assert read.prompt_alt_tokens.tokens.tolist() == [[3, 4], [5, 6]]
    assert (read.prompt_cache_hit_tokens, len(read.topk_prompt_logprobs)) == (4, 3)


def test_numbers_that_json_does_not_have() -> None:
    assert finite({"a": float("nan"), "b": float("inf"), "c": -1.0}) == {"b": 1.7976931348623157e308, "c": -1.0}

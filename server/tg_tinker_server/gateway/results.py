"""Results as the protocol carries them: protobuf for passes and samples, JSON for the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tg_tinker.proto.v1 import gateway_pb2 as pb
from tg_tinker.types.datum import TensorData
from tg_tinker.types.tokens import SampleResponse, TopkLogprobs
from tg_tinker_server.gateway.tensors import Layout

ARRAY_RECORD = "ArrayRecord"
_LARGEST = 1.7976931348623157e308  # stands for infinity, which JSON does not have
_DTYPES: dict[str, tuple[pb.DType, str]] = {
    "float32": (pb.DTYPE_FLOAT32, "<f4"),
    "int64": (pb.DTYPE_INT64, "<i8"),
}


def pass_to_proto(
    outputs: Sequence[Mapping[str, TensorData]], metrics: Mapping[str, float]
) -> pb.ForwardBackwardOutput:
    """The outcome of a pass. Datums of one trailing shape in a row share a record; fields are the first datum's.

    Metrics must be named ``name:reducer``: the official client fails on anything else.
    """
    message = pb.ForwardBackwardOutput(loss_fn_output_type=ARRAY_RECORD, metrics=_named(metrics))
    arrays = [{name: tensor.to_numpy() for name, tensor in datum.items()} for datum in outputs]
    start = 0
    for end in range(1, len(arrays) + 1):
        if end == len(arrays) or _layout(arrays[end]) != _layout(arrays[start]):
            _add_record(message, arrays[start:end])
            start = end
    return message


def pass_to_json(outputs: Sequence[Mapping[str, TensorData]], metrics: Mapping[str, float]) -> dict[str, Any]:
    """The same for clients that do not ask for protobuf."""
    return {
        "loss_fn_output_type": ARRAY_RECORD,
        "loss_fn_outputs": [
            {n: {"data": finite_list(t.data), "dtype": t.dtype, "shape": t.shape} for n, t in datum.items()}
            for datum in outputs
        ],
        "metrics": finite(_named(metrics)),
    }


def sample_to_proto(response: SampleResponse, layout: Layout | None = None) -> pb.SampleResponse:
    """What came of a sample.

    Args:
        layout: of the ids that were asked for at the prompt's positions, if those were sparse: so is the answer.
    """
    message = pb.SampleResponse(prompt_cache_hit_tokens=response.prompt_cache_hit_tokens)
    for sequence in response.sequences:
        added = message.sequences.add(
            stop_reason=pb.STOP_REASON_STOP if sequence.stop_reason == "stop" else pb.STOP_REASON_LENGTH,
            tokens=np.asarray(sequence.tokens, dtype="<i4").tobytes(),
            logprobs=np.asarray(sequence.logprobs, dtype="<f4").tobytes(),
        )
        if sequence.topk_logprobs is not None:
            added.topk_sampled_logprobs.CopyFrom(_topk(sequence.topk_logprobs))
    if response.prompt_logprobs is not None:
        values = [math.nan if v is None else v for v in response.prompt_logprobs]
        message.prompt_logprobs = np.asarray(values, dtype="<f4").tobytes()
    if response.topk_prompt_logprobs is not None:
        message.topk_prompt_logprobs.CopyFrom(_topk(response.topk_prompt_logprobs))
    # Here row i belongs to position i; there the first position, which nothing precedes, has no row.
    if response.target_prompt_logprobs is not None:
        targets = np.nan_to_num(response.target_prompt_logprobs[1:], nan=0.0)
        found = _tensor(targets, "float32") if layout is None else _sparse(targets, layout)
        message.target_prompt_logprobs.CopyFrom(found)
    if response.prompt_alt_tokens is not None:
        drawn = response.prompt_alt_tokens
        message.prompt_alt_tokens.tokens.CopyFrom(_tensor(drawn.token_ids[1:], "int64"))
        message.prompt_alt_tokens.logprobs.CopyFrom(_tensor(drawn.logprobs[1:], "float32"))
    return message


def finite(values: Mapping[str, float]) -> dict[str, float]:
    """Numbers as JSON can carry them: what is not a number is left out, infinity becomes the largest number."""
    return {k: max(-_LARGEST, min(_LARGEST, float(v))) for k, v in values.items() if not math.isnan(v)}


def finite_list(values: Sequence[Any]) -> list[Any]:
    """The same for a list, where what is not a number is null."""
    return [None if isinstance(v, float) and not math.isfinite(v) else v for v in values]


def _named(metrics: Mapping[str, float]) -> dict[str, float]:
    return {k: float(v) for k, v in metrics.items() if k.count(":") == 1}


def _layout(datum: Mapping[str, npt.NDArray[Any]]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape[1:] for name, array in datum.items()}


def _add_record(message: pb.ForwardBackwardOutput, datums: Sequence[Mapping[str, npt.NDArray[Any]]]) -> None:
    record = message.loss_fn_outputs.add(type_tag=ARRAY_RECORD, num_datums=len(datums))
    for name, first in datums[0].items():
        dtype, stored = _DTYPES["int64" if first.dtype.kind in "iu" else "float32"]
        pieces = [np.ascontiguousarray(d[name], dtype=stored).tobytes() for d in datums]
        offsets = np.cumsum([0, *(len(p) for p in pieces)], dtype="<i8")
        record.fields[name].CopyFrom(
            pb.BatchedTensor(
                data=b"".join(pieces), offsets=offsets.tobytes(), dtype=dtype, trailing_shape=first.shape[1:]
            )
        )


def _topk(topk: TopkLogprobs) -> pb.TopkLogprobs:
    length, k = topk.token_ids.shape
    return pb.TopkLogprobs(
        token_ids=np.ascontiguousarray(topk.token_ids, dtype="<i4").tobytes(),
        logprobs=np.ascontiguousarray(topk.logprobs, dtype="<f4").tobytes(),
        k=k,
        length=length,
    )


def _tensor(array: npt.NDArray[Any], kind: str) -> pb.Tensor:
    dtype, stored = _DTYPES[kind]
    return pb.Tensor(dense=np.ascontiguousarray(array, dtype=stored).tobytes(), dtype=dtype, shape=array.shape)


def _sparse(array: npt.NDArray[Any], layout: Layout) -> pb.Tensor:
    csr = pb.SparseCsr(
        values=np.ascontiguousarray(array[layout.cells], dtype="<f4").tobytes(),
        crow_indices=layout.crow.astype("<i8").tobytes(),
        col_indices=layout.col.astype("<i8").tobytes(),
    )
    return pb.Tensor(sparse_csr=csr, dtype=pb.DTYPE_FLOAT32, shape=layout.shape)

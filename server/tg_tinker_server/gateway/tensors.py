"""Tensors and datums of the protocol, from protobuf and from JSON. Sizes are checked before memory is taken."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tg_tinker.errors import InvalidRequestError
from tg_tinker.proto.v1 import gateway_pb2 as pb
from tg_tinker.types.datum import Datum, EncodedTextChunk, ModelInput, TensorData

Array = npt.NDArray[Any]
MOST_ELEMENTS = 1 << 26  # of the dense tensors of one request together
_STORED: dict[int, npt.DTypeLike] = {
    pb.DTYPE_FLOAT32: "<f4",
    pb.DTYPE_INT64: "<i8",
    pb.DTYPE_INT32: "<i4",
    pb.DTYPE_BFLOAT16: "<u2",
}


@dataclass(frozen=True, slots=True)
class Layout:
    """Which cells of a sparse tensor are listed: row ``i`` lists ``col[crow[i]:crow[i + 1]]``."""

    shape: tuple[int, int]
    crow: npt.NDArray[np.int64]
    col: npt.NDArray[np.int64]

    @property
    def cells(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Row of each listed cell, and its number in that row."""
        counts = np.diff(self.crow)
        rows = np.repeat(np.arange(len(counts)), counts)
        return rows, np.arange(len(self.col)) - np.repeat(self.crow[:-1], counts)


def listed_from_json(name: str, value: Mapping[str, Any], *, filling: int) -> tuple[npt.NDArray[np.int64], Layout]:
    """What a sparse tensor of integers lists, moved to the left of each row, and where it belongs.

    Raises:
        InvalidRequestError: it is none, or lists too much.
    """
    try:
        flat = [np.asarray(value[k], dtype=np.int64) for k in ("data", "sparse_crow_indices", "sparse_col_indices")]
        rows, columns = (int(n) for n in value["shape"])
    except (KeyError, TypeError, ValueError, OverflowError) as e:
        raise _refuse(f"{name} is no sparse tensor of int64 in two dimensions", "CSR") from e
    data, crow, col = flat
    fits = all(a.ndim == 1 for a in flat) and rows >= 0 and crow.size == rows + 1
    fits = fits and crow[0] == 0 and bool((np.diff(crow) >= 0).all()) and crow[-1] == col.size == data.size
    if not fits or (col < 0).any() or (col >= columns).any():
        raise _refuse(f"the indices of {name} do not fit its shape and values", "CSR")
    layout = Layout((rows, columns), crow, col)
    width = max(1, int(np.diff(crow).max(initial=0)))
    if rows * width > MOST_ELEMENTS:
        raise _refuse(f"{name} lists too much", f"rows by most cells of a row at most {MOST_ELEMENTS}")
    dense = np.full((rows, width), filling, dtype=np.int64)
    dense[layout.cells] = data
    return dense, layout


class DatumReader:
    """Reads the datums of one request; together their dense tensors have at most ``MOST_ELEMENTS`` values."""

    def __init__(self) -> None:
        self._left = MOST_ELEMENTS

    def from_proto(self, message: pb.Datum) -> Datum:
        """A datum.

        Raises:
            InvalidRequestError: images or audio, or a tensor whose bytes do not fit its shape.
        """
        chunks = [EncodedTextChunk(tokens=_tokens(chunk)) for chunk in message.model_input]
        inputs = {name: self.tensor(name, tensor) for name, tensor in message.loss_fn_inputs.items()}
        return Datum(ModelInput(chunks=chunks), inputs)

    def from_json(self, value: Mapping[str, Any]) -> Datum:
        """The same from the JSON that old clients send."""
        inputs = value.get("loss_fn_inputs") or {}
        if not isinstance(inputs, Mapping):
            raise _refuse("loss_fn_inputs is not an object", "an object of tensors")
        tokens = model_input_from_json(value.get("model_input"))
        read = {str(name): self._json_tensor(str(name), tensor) for name, tensor in inputs.items()}
        return Datum(ModelInput.from_ints(tokens), read)

    def tensor(self, name: str, message: pb.Tensor) -> TensorData:
        """A dense tensor of float32 or int64, however it was sent."""
        stored = _STORED.get(message.dtype)
        if stored is None:
            raise _refuse(f"{name} has the dtype {message.dtype}", "float32, int64, int32 or bfloat16")
        shape = [int(n) for n in message.shape]
        if message.WhichOneof("encoding") == "sparse_csr":
            dense = self._densify(name, message.sparse_csr, np.dtype(stored), shape)
        else:
            dense = self._shaped(name, _buffer(name, message.dense, stored), shape)
        if message.dtype == pb.DTYPE_BFLOAT16:  # the upper half of a float32
            dense = (dense.astype(np.uint32) << 16).view(np.float32)
        return TensorData.from_numpy(dense.astype(np.int64 if dense.dtype.kind in "iu" else np.float32))

    def _shaped(self, name: str, values: Array, shape: Sequence[int]) -> Array:
        self._take(name, values.size)
        if not shape:
            return values
        if any(n < 0 for n in shape) or math.prod(shape) != values.size:
            raise _refuse(f"{name} has {values.size} values, which do not fill its shape", "shape of the data")
        return values.reshape(shape)

    def _densify(self, name: str, csr: pb.SparseCsr, stored: np.dtype[Any], shape: Sequence[int]) -> Array:
        if len(shape) != 2 or any(n < 0 for n in shape):
            raise _refuse(f"{name} is sparse and has no shape of two dimensions", "[rows, columns]")
        values = _buffer(name, csr.values, stored)
        crow, col = _buffer(name, csr.crow_indices, "<i8"), _buffer(name, csr.col_indices, "<i8")
        rows, columns = shape
        self._take(name, rows * columns)
        fits = crow.size == rows + 1 and crow[0] == 0 and crow[-1] == col.size == values.size
        if not fits or (np.diff(crow) < 0).any() or (col < 0).any() or (col >= columns).any():
            raise _refuse(f"the indices of {name} do not fit its shape and values", "CSR")
        dense = np.zeros((rows, columns), dtype=stored)
        dense[np.repeat(np.arange(rows), np.diff(crow)), col] = values
        return dense

    def _take(self, name: str, elements: int) -> None:
        self._left -= elements
        if self._left < 0:
            raise _refuse(f"with {name} the request has over {MOST_ELEMENTS} values", "split the batch")

    def _json_tensor(self, name: str, value: Any) -> TensorData:
        if not isinstance(value, Mapping):
            raise _refuse(f"{name} is not an object with data, dtype and shape", "a tensor")
        shape, data = value.get("shape"), value.get("data")
        if not isinstance(data, list) or value.get("dtype") not in ("int64", "float32"):
            raise _refuse(f"{name} has no list of data, or a dtype that is not int64 or float32", "a tensor")
        try:
            self._take(name, len(data) if not shape else math.prod(int(n) for n in shape))
            flat: Array = np.asarray(data, dtype=np.int64 if value["dtype"] == "int64" else np.float32)
            crow, col = value.get("sparse_crow_indices"), value.get("sparse_col_indices")
            return TensorData.from_numpy(TensorData(flat, value["dtype"], shape, crow, col).to_numpy())
        except (TypeError, ValueError, OverflowError, MemoryError) as e:
            raise _refuse(f"{name} is not a tensor of numbers", "numbers that fill the shape") from e


def model_input_from_json(value: Any) -> list[int]:
    """The token ids of a prompt or a model input.

    Raises:
        InvalidRequestError: images or audio, or no token ids.
    """
    chunks = value.get("chunks") if isinstance(value, Mapping) else None
    if not isinstance(chunks, list):
        raise InvalidRequestError("a model input is an object with chunks", field="chunks", constraint="a list")
    tokens: list[int] = []
    for chunk in chunks:
        kind = chunk.get("type", "encoded_text") if isinstance(chunk, Mapping) else None
        if kind != "encoded_text":
            raise _only_text(str(kind)[:40])
        part = chunk.get("tokens")
        if not isinstance(part, list) or not all(type(t) is int and -(2**31) <= t < 2**31 for t in part):
            raise InvalidRequestError("tokens are 32-bit integers", field="tokens", constraint="int32")
        tokens += part
    return tokens


def _tokens(chunk: pb.Chunk) -> list[int]:
    kind = chunk.WhichOneof("chunk")
    if kind != "encoded_text":
        raise _only_text(kind or "empty")
    ids: list[int] = _buffer("tokens", chunk.encoded_text.tokens, "<i4").tolist()
    return ids


def _buffer(name: str, data: bytes, dtype: npt.DTypeLike) -> Array:
    size = np.dtype(dtype).itemsize
    if len(data) % size:
        raise _refuse(f"{name} has {len(data)} bytes, which is no whole number of values of {size}", "whole values")
    return np.frombuffer(data, dtype=dtype)


def _only_text(kind: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"a chunk of type {kind} was sent; this server trains and samples text models only: send encoded_text chunks",
        field="model_input.chunks",
        constraint="encoded_text",
    )


def _refuse(message: str, constraint: str) -> InvalidRequestError:
    return InvalidRequestError(message, field="loss_fn_inputs", constraint=constraint)

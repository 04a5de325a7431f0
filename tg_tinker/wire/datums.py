"""Datums on the wire, and their digest: tensors are dtype, shape and little-endian bytes, dense or in CSR form."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from tg_tinker.errors import InvalidRequestError
from tg_tinker.proto.v1 import training_pb2
from tg_tinker.types.datum import Datum, EncodedTextChunk, ModelInput, TensorData

MAX_DATUMS = 1 << 16
_DOMAIN = b"tg-tinker/datums/v1\x00"
_DTYPES: dict[str, np.dtype[Any]] = {"int64": np.dtype("<i8"), "float32": np.dtype("<f4")}
_MAX_DIMENSIONS = 8
_MAX_INPUTS = 64


def datum_to_bytes(datum: Datum) -> bytes:
    """A datum as an encoded message.

    Raises:
        InvalidRequestError: a token id that is no int64.
    """
    chunks = datum.model_input.chunks
    return training_pb2.Datum(
        tokens=_int_bytes((t for chunk in chunks for t in chunk.tokens), field="model_input"),
        chunk_lengths=_int_bytes((len(chunk.tokens) for chunk in chunks), field="model_input"),
        inputs=tensors_to_proto(datum.loss_fn_inputs),
    ).SerializeToString()


def datum_from_bytes(data: bytes) -> Datum:
    """A datum from an encoded message. Its tensors share memory with it and are read-only.

    Raises:
        InvalidRequestError: it is no datum, or its parts do not fit each other.
    """
    try:
        message = training_pb2.Datum.FromString(data)
    except DecodeError as e:
        raise _refuse("a datum is not a Datum message", "data", "Datum") from e
    tokens, lengths = _ints(message.tokens, "model_input"), _ints(message.chunk_lengths, "model_input")
    # Lengths are compared one by one: their sum could overflow.
    if any(not 0 <= n <= len(tokens) for n in lengths):
        raise _refuse("the chunks of a datum do not fit its tokens", "model_input", "lengths of chunks")
    ends = np.cumsum(lengths, dtype=object) if len(lengths) else np.zeros(1, dtype=object)
    if ends[-1] != len(tokens):
        raise _refuse("the chunks of a datum do not fit its tokens", "model_input", "lengths of chunks")
    chunks = [
        EncodedTextChunk(tokens=tokens[int(end) - int(n) : int(end)].tolist())
        for end, n in zip(ends, lengths, strict=False)
    ]
    return Datum(ModelInput(chunks=chunks), tensors_from_proto(message.inputs))


def tensors_to_proto(tensors: Mapping[str, TensorData]) -> list[training_pb2.LossTensor]:
    """Named tensors as messages, in order of their names."""
    return [_tensor_to_proto(name, tensors[name]) for name in sorted(tensors)]


def tensors_from_proto(messages: Sequence[training_pb2.LossTensor]) -> dict[str, TensorData]:
    """Named tensors from messages.

    Raises:
        InvalidRequestError: naming the tensor that cannot be what it says.
    """
    if len(messages) > _MAX_INPUTS:
        raise _refuse(f"a datum has {len(messages)} tensors", "loss_fn_inputs", f"at most {_MAX_INPUTS}")
    found = {message.name: _tensor_from_proto(message) for message in messages}
    if len(found) != len(messages):
        raise _refuse("two tensors of a datum have one name", "loss_fn_inputs", "distinct names")
    return found


def data_digest(data: Iterable[Datum]) -> bytes:
    """SHA-256 over the canonical bytes of datums: domain tag, then of each its tokens and, by name, its tensors.

    How a model input is cut into chunks makes no difference; whether a tensor is dense or sparse does.
    """
    digest = hashlib.sha256(_DOMAIN)
    for datum in data:
        tokens = _int_bytes(datum.model_input.to_ints(), field="model_input")
        tensors = tensors_to_proto(datum.loss_fn_inputs)
        _feed(digest, f"datum:{len(tensors)}".encode(), tokens)
        for tensor in tensors:
            shape = ",".join(str(n) for n in tensor.shape)
            _feed(digest, f"{tensor.dtype}:{shape}".encode(), tensor.name.encode())
            _feed(digest, tensor.crow_indices, tensor.col_indices, tensor.data)
    return digest.digest()


def _feed(digest: Any, *parts: bytes) -> None:
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)


def _tensor_to_proto(name: str, tensor: TensorData) -> training_pb2.LossTensor:
    values = tensor.to_numpy() if not tensor.is_sparse else np.asarray(tensor.data)
    message = training_pb2.LossTensor(
        name=name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        data=np.ascontiguousarray(values).astype(_DTYPES[tensor.dtype], copy=False).tobytes(),
    )
    if tensor.sparse_crow_indices is not None and tensor.sparse_col_indices is not None:
        message.crow_indices = _int_bytes(tensor.sparse_crow_indices, field=name)
        message.col_indices = _int_bytes(tensor.sparse_col_indices, field=name)
    return message


def _tensor_from_proto(message: training_pb2.LossTensor) -> TensorData:
    field = f"loss_fn_inputs.{message.name[:64]}"
    dtype = _DTYPES.get(message.dtype)
    if dtype is None:
        raise _refuse(f"{field} has dtype {message.dtype[:40]!r}; known: {', '.join(_DTYPES)}", field, "known dtype")
    shape = tuple(message.shape[: _MAX_DIMENSIONS + 1])
    sparse = bool(message.crow_indices)
    stored = len(message.data) // dtype.itemsize
    # Not a product of numpy integers: Python integers cannot overflow.
    if len(shape) > _MAX_DIMENSIONS or any(n < 0 for n in shape) or len(message.data) % dtype.itemsize:
        raise _refuse(f"{field} has an impossible shape", field, "data of the stated shape")
    if (not sparse and math.prod(shape) != stored) or (not stored and math.prod(n for n in shape if n) >= 2**62):
        raise _refuse(
            f"{field} has shape {list(shape)} of {message.dtype} but {len(message.data)} bytes of data",
            field,
            "data of the stated shape",
        )
    values = np.frombuffer(message.data, dtype=dtype)
    if not sparse:
        return TensorData(values.reshape(shape), dtype=message.dtype)  # type: ignore[arg-type]
    crow, col = _ints(message.crow_indices, field), _ints(message.col_indices, field)
    # Compared, not subtracted: a difference could overflow.
    if (crow < 0).any() or (crow > stored).any() or (crow[1:] < crow[:-1]).any():
        raise _refuse(f"the indices of {field} do not fit its values", field, "CSR")
    return TensorData(
        values,
        dtype=message.dtype,  # type: ignore[arg-type]
        shape=shape,
        sparse_crow_indices=crow.tolist(),
        sparse_col_indices=col.tolist(),
    )


def _int_bytes(values: Iterable[int], *, field: str) -> bytes:
    try:
        return np.fromiter(values, dtype=np.int64).astype("<i8", copy=False).tobytes()
    except (OverflowError, TypeError, ValueError) as e:
        raise _refuse(f"{field} holds something that is no int64", field, "int64") from e


def _ints(data: bytes, field: str) -> npt.NDArray[np.int64]:
    if len(data) % 8:
        raise _refuse(f"{field} has {len(data)} bytes, which are no int64 values", field, "int64")
    return np.frombuffer(data, dtype="<i8").astype(np.int64, copy=False)


def _refuse(message: str, field: str, constraint: str) -> InvalidRequestError:
    return InvalidRequestError(message, field=field, constraint=constraint)

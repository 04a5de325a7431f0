"""Tensors on the wire: dtype, shape, little-endian row-major bytes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from tg_tinker.errors import InvalidRequestError
from tg_tinker.proto.v1 import common_pb2

_DTYPES = ("int64", "int32", "uint8", "bool", "float64", "float32", "float16")
_MAX_DIMENSIONS = 8


def tensor_to_proto(array: npt.NDArray[Any]) -> common_pb2.Tensor:
    """Copy an array into a message."""
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return common_pb2.Tensor(dtype=array.dtype.name, shape=array.shape, data=little.tobytes())


def tensor_from_proto(tensor: common_pb2.Tensor, *, field: str) -> npt.NDArray[Any]:
    """Read an array. It shares memory with the message and is read-only.

    Raises:
        InvalidRequestError: naming ``field``: unknown dtype, impossible shape, or a length that does not fit.
    """
    if tensor.dtype not in _DTYPES:
        raise InvalidRequestError(
            f"{field} has dtype {tensor.dtype[:40]!r}; known: {', '.join(_DTYPES)}",
            field=field,
            constraint="known dtype",
        )
    shape = tuple(tensor.shape)
    dtype = np.dtype(tensor.dtype).newbyteorder("<")
    # Not math.prod of numpy integers: Python integers cannot overflow.
    expected = math.prod(shape) * dtype.itemsize
    if len(shape) > _MAX_DIMENSIONS or any(n < 0 for n in shape) or expected != len(tensor.data):
        raise InvalidRequestError(
            f"{field} has shape {list(shape)[: _MAX_DIMENSIONS + 1]} of {tensor.dtype} but "
            f"{len(tensor.data)} bytes of data",
            field=field,
            constraint="data of the stated shape",
        )
    try:
        array = np.frombuffer(tensor.data, dtype=dtype).reshape(shape)
    except ValueError as e:  # e.g. [0, 2**62]: zero bytes, and more elements than numpy can count
        raise InvalidRequestError(
            f"{field} has an impossible shape", field=field, constraint="data of the stated shape"
        ) from e
    return array.astype(np.dtype(tensor.dtype), copy=False)

"""Datums: a sequence of tokens and what a loss needs beside it, in the shape of the public training API.

Unlike a ``BatchData``, nothing is shifted here: ``target_tokens[i]`` is what position ``i`` predicts.
Shape suffixes: N positions, K alternatives.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from tg_tinker.errors import InvalidRequestError

Array = npt.NDArray[Any]
TensorDtype = Literal["int64", "float32"]
_DTYPES: dict[str, type[np.generic]] = {"int64": np.int64, "float32": np.float32}
DTYPE_OF_INPUT: dict[str, TensorDtype] = {
    "target_tokens": "int64",
    "weights": "float32",
    "advantages": "float32",
    "logprobs": "float32",
    "clip_low_threshold": "float32",
    "clip_high_threshold": "float32",
    "sequence_ratio_mask": "float32",
}
"""The dtype that a plain list under this name becomes."""


class TensorData:
    """A tensor of int64 or float32, dense or in CSR form (two dimensions; what is not stored is zero).

    Args:
        data: values; of a sparse tensor the stored ones.
        dtype: "int64" or "float32".
        shape: of the dense tensor; may be left out where ``data`` is dense.
        sparse_crow_indices: row pointers, one more than rows.
        sparse_col_indices: column of each stored value.

    Raises:
        InvalidRequestError: ragged, not numeric, or sizes that do not fit the shape.

    >>> TensorData([1, 2, 3], dtype="int64").shape
    [3]
    """

    __slots__ = ("_values", "dtype", "shape", "sparse_col_indices", "sparse_crow_indices")

    def __init__(
        self,
        data: Any,
        dtype: TensorDtype,
        shape: Sequence[int] | None = None,
        sparse_crow_indices: Sequence[int] | None = None,
        sparse_col_indices: Sequence[int] | None = None,
    ) -> None:
        if dtype not in _DTYPES:
            raise _refuse(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}", "int64 or float32")
        values = _array(data).astype(_DTYPES[dtype], copy=False)
        if (sparse_crow_indices is None) != (sparse_col_indices is None):
            raise _refuse("a sparse tensor has both crow and col indices", "both or neither")
        if sparse_crow_indices is not None and sparse_col_indices is not None:
            sparse_crow_indices, sparse_col_indices = list(sparse_crow_indices), list(sparse_col_indices)
            _check_csr(values, shape, sparse_crow_indices, sparse_col_indices)
        elif shape is not None:
            if int(np.prod(shape, dtype=np.int64)) != values.size or any(n < 0 for n in shape):
                raise _refuse(f"{values.size} values do not fill the shape {list(shape)}", "shape of the data")
            values = values.reshape(tuple(shape))
        self.dtype: TensorDtype = dtype
        self.shape: list[int] = [int(n) for n in (values.shape if shape is None else shape)]
        self.sparse_crow_indices = sparse_crow_indices
        self.sparse_col_indices = sparse_col_indices
        self._values = np.ascontiguousarray(values)

    @classmethod
    def from_numpy(cls, array: Array) -> Self:
        """Of an array; integers become int64, floats float32."""
        return cls(array, dtype="int64" if np.asarray(array).dtype.kind in "iub" else "float32")

    @classmethod
    def from_torch(cls, tensor: Any) -> Self:
        """Of a torch tensor, detached."""
        detached = tensor.detach().cpu()
        return cls.from_numpy((detached.float() if detached.is_floating_point() else detached).numpy())

    @classmethod
    def from_list(cls, values: Sequence[Any]) -> Self:
        """Of a (nested) list of numbers."""
        return cls.from_numpy(_array(values))

    @property
    def data(self) -> list[Any]:
        """The values, flat; of a sparse tensor the stored ones."""
        return self._values.reshape(-1).tolist()

    @property
    def is_sparse(self) -> bool:
        """Whether it is in CSR form."""
        return self.sparse_crow_indices is not None

    def to_numpy(self) -> Array:
        """The dense array."""
        if self.sparse_crow_indices is None or self.sparse_col_indices is None:
            return self._values
        dense = np.zeros(self.shape, dtype=self._values.dtype)
        rows = np.repeat(np.arange(self.shape[0]), np.diff(self.sparse_crow_indices))
        dense[rows, self.sparse_col_indices] = self._values
        return dense

    def to_torch(self) -> Any:
        """The dense tensor; needs torch."""
        import torch

        return torch.from_numpy(self.to_numpy().copy())

    def tolist(self) -> list[Any]:
        """The dense values, nested."""
        return self.to_numpy().tolist()  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return self.shape[0]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorData):
            return NotImplemented
        return self.dtype == other.dtype and np.array_equal(self.to_numpy(), other.to_numpy(), equal_nan=True)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"TensorData(dtype={self.dtype!r}, shape={self.shape})"


@dataclass(frozen=True)
class EncodedTextChunk:
    """A run of token ids."""

    tokens: Sequence[int]
    type: Literal["encoded_text"] = "encoded_text"

    @property
    def length(self) -> int:
        """In tokens."""
        return len(self.tokens)


@dataclass(frozen=True)
class ModelInput:
    """What a model reads: chunks of token ids.

    >>> ModelInput.from_ints([1, 2]).append_int(3).to_ints()
    [1, 2, 3]
    """

    chunks: Sequence[EncodedTextChunk] = ()

    @classmethod
    def from_ints(cls, tokens: Sequence[int]) -> ModelInput:
        """One chunk."""
        return cls(chunks=[EncodedTextChunk(tokens=[int(t) for t in tokens])])

    @classmethod
    def empty(cls) -> ModelInput:
        """Nothing."""
        return cls(chunks=[])

    def append(self, chunk: EncodedTextChunk) -> ModelInput:
        """With one more chunk."""
        return ModelInput(chunks=[*self.chunks, chunk])

    def append_int(self, token: int) -> ModelInput:
        """With one more token, in the last chunk."""
        if not self.chunks:
            return self.from_ints([token])
        *before, last = self.chunks
        return ModelInput(chunks=[*before, EncodedTextChunk(tokens=[*last.tokens, int(token)])])

    def to_ints(self) -> list[int]:
        """All token ids."""
        return [int(t) for chunk in self.chunks for t in chunk.tokens]

    @property
    def length(self) -> int:
        """In tokens."""
        return sum(chunk.length for chunk in self.chunks)


@dataclass(frozen=True, eq=False)
class Datum:
    """One sequence and the inputs of a loss.

    Args:
        model_input: the tokens the model reads.
        loss_fn_inputs: by name, one value for each position: TensorData, lists, numpy arrays or torch tensors. Which
            names a loss takes: ``tg_tinker.types.losses.LOSSES``.

    Raises:
        InvalidRequestError: a list that is ragged, or under a name whose dtype is not known.

    >>> datum = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], "weights": [1, 0]})
    >>> datum.loss_fn_inputs["weights"].dtype
    'float32'
    """

    model_input: ModelInput
    loss_fn_inputs: Mapping[str, TensorData] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given: Mapping[str, Any] = self.loss_fn_inputs
        object.__setattr__(self, "loss_fn_inputs", {name: _tensor(name, value) for name, value in given.items()})


def _tensor(name: str, value: Any) -> TensorData:
    if isinstance(value, TensorData):
        return value
    if hasattr(value, "detach"):
        return TensorData.from_torch(value)
    if isinstance(value, np.ndarray):
        return TensorData.from_numpy(value)
    if name not in DTYPE_OF_INPUT:
        raise InvalidRequestError(
            f"loss_fn_inputs[{name!r}] is a plain list of unknown dtype; give a TensorData, or use one of "
            f"{', '.join(DTYPE_OF_INPUT)}",
            field=f"loss_fn_inputs.{name}",
            constraint="a TensorData",
        )
    return TensorData(value, dtype=DTYPE_OF_INPUT[name])


def _array(data: Any) -> Array:
    try:
        array = np.asarray(data)
    except ValueError as e:
        raise _refuse("a list of numbers is ragged: its rows have different lengths", "rectangular") from e
    if array.dtype.kind not in "iubf":
        if array.size:
            raise _refuse(f"values of type {array.dtype} are not numbers", "numbers")
        array = array.astype(np.float32)
    return array


def _check_csr(values: Array, shape: Sequence[int] | None, crow: list[int], col: list[int]) -> None:
    if shape is None or len(shape) != 2 or any(n < 0 for n in shape):
        raise _refuse("a sparse tensor needs its shape [rows, columns]", "two dimensions")
    fits = (
        len(crow) == shape[0] + 1
        and crow[0] == 0
        and crow[-1] == len(col) == values.size
        and all(a <= b for a, b in itertools.pairwise(crow))  # compared: a difference could overflow
        and all(0 <= c < shape[1] for c in col)
    )
    if not fits:
        raise _refuse("the indices of a sparse tensor do not fit its shape and values", "CSR")


def _refuse(message: str, constraint: str) -> InvalidRequestError:
    return InvalidRequestError(message, field="loss_fn_inputs", constraint=constraint)


__all__ = ["DTYPE_OF_INPUT", "Datum", "EncodedTextChunk", "ModelInput", "TensorData"]

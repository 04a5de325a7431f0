"""A batch of token sequences, and the hash that identifies it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tg_tinker.errors import InvalidRequestError

# Shape suffixes: B records, T tokens.
IGNORE_INDEX = -100
_FIELDS = ("input_ids", "attention_mask", "labels")
_DOMAIN = b"tg-tinker/batch/v1\x00"
Ints = npt.NDArray[np.int64]


def _as_int64(name: str, value: Any) -> Ints:
    """Convert lists, numpy or torch tensors to int64 [B, T]; a clear error for anything else."""
    if hasattr(value, "detach"):  # torch, without importing it
        value = value.detach().cpu().numpy()
    try:
        array = np.asarray(value)
    except ValueError as e:
        raise InvalidRequestError(
            f"{name} is ragged: every record must have the same number of tokens; pad the shorter ones "
            f"and mask them with attention_mask (tg_tinker.data.collate does both)",
            field=f"batch.{name}",
            constraint="rectangular [records, tokens]",
        ) from e
    if array.size == 0:
        array = array.reshape(array.shape if array.ndim == 2 else (0, 0)).astype(np.int64)
    if array.ndim != 2:
        raise InvalidRequestError(
            f"{name} has {array.ndim} dimension(s); it must have two, [records, tokens]",
            field=f"batch.{name}",
            constraint="two dimensions [records, tokens]",
        )
    if array.dtype == np.bool_:
        array = array.astype(np.int64)
    if not np.issubdtype(array.dtype, np.integer):
        raise InvalidRequestError(
            f"{name} has dtype {array.dtype}; token ids, masks and labels are integers",
            field=f"batch.{name}",
            constraint="integer dtype",
        )
    if np.issubdtype(array.dtype, np.unsignedinteger) and array.size and array.max() > np.iinfo(np.int64).max:
        raise InvalidRequestError(
            f"{name} holds a value beyond 64-bit integers", field=f"batch.{name}", constraint="int64"
        )
    return np.ascontiguousarray(array, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class BatchData:
    """Token ids [records, tokens] with an optional mask (1 = real token) and labels (-100 = ignored).

    Lists, numpy arrays and torch tensors are accepted and kept as int64 arrays. Labels are aligned with
    ``input_ids`` (the shift by one happens inside, as in transformers); without labels, every real token
    is a target.

    Raises:
        InvalidRequestError: ragged, not two-dimensional, not integer, or shapes that differ.

    >>> BatchData(input_ids=[[5, 6, 7], [8, 9, 0]], attention_mask=[[1, 1, 1], [1, 1, 0]]).num_tokens
    5
    """

    input_ids: Any
    attention_mask: Any = None
    labels: Any = None

    def __post_init__(self) -> None:
        ids = _as_int64("input_ids", self.input_ids)
        object.__setattr__(self, "input_ids", ids)
        for name in _FIELDS[1:]:
            value = getattr(self, name)
            if value is None:
                continue
            array = _as_int64(name, value)
            if array.shape != ids.shape:
                raise InvalidRequestError(
                    f"{name} has shape {list(array.shape)} but input_ids has {list(ids.shape)}",
                    field=f"batch.{name}",
                    constraint="same shape as input_ids",
                )
            if name == "attention_mask" and array.size and not np.isin(array, (0, 1)).all():
                raise InvalidRequestError(
                    "attention_mask holds values other than 0 and 1",
                    field="batch.attention_mask",
                    constraint="0 or 1",
                )
            object.__setattr__(self, name, array)

    @classmethod
    def of(cls, batch: BatchData | Mapping[str, Any]) -> BatchData:
        """Take a BatchData as it is, or build one from a mapping with the keys of the reference."""
        if isinstance(batch, BatchData):
            return batch
        if not isinstance(batch, Mapping):
            raise InvalidRequestError(
                f"batch is a {type(batch).__name__}; pass a BatchData or one dict of arrays "
                "{'input_ids': ..., 'attention_mask': ..., 'labels': ...}, not a list of records",
                field="batch",
                constraint="BatchData or dict",
            )
        unknown = sorted(str(k) for k in set(batch) - set(_FIELDS))
        if unknown:
            raise InvalidRequestError(
                f"batch has unknown keys {unknown}; known keys are {list(_FIELDS)}",
                field="batch",
                constraint="known keys only",
            )
        if "input_ids" not in batch:
            raise InvalidRequestError("batch has no input_ids", field="batch.input_ids", constraint="required")
        return cls(**{k: batch[k] for k in _FIELDS if k in batch})

    @property
    def num_records(self) -> int:
        """Number of records in the batch."""
        return int(self.input_ids.shape[0])

    @property
    def num_tokens(self) -> int:
        """Real tokens: the sum of the attention mask."""
        return int(self.input_ids.size if self.attention_mask is None else self.attention_mask.sum())


def batch_digest(batch: BatchData) -> bytes:
    """SHA-256 over the canonical bytes of a batch: domain tag, then per sorted name dtype, shape and data."""
    digest = hashlib.sha256(_DOMAIN)
    for name in sorted(_FIELDS):
        array = getattr(batch, name)
        if array is None:
            continue
        header = f"{name}:int64:{','.join(str(n) for n in array.shape)}".encode()
        digest.update(len(header).to_bytes(4, "little") + header)
        digest.update(array.astype("<i8", copy=False).tobytes())
    return digest.digest()


def hash_batch(batch: BatchData | Mapping[str, Any]) -> str:
    """The hash the server returns for this batch when differential privacy is off: ``sha256:<hex>``.

    The order of keys does not matter, nor whether lists, numpy or torch tensors are given.

    >>> hash_batch({"input_ids": [[1, 2]]}) == hash_batch({"input_ids": np.array([[1, 2]], dtype=np.int32)})
    True
    """
    return "sha256:" + batch_digest(BatchData.of(batch)).hex()

"""One record of a registered dataset, and the bytes it is kept in.

The bytes are canonical: a record has one encoding, and ids of records are keyed hashes of it
(docs/formats/dataset.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types.batch import IGNORE_INDEX
from tg_tinker.types.configs import DPConfig

# Shape suffix: T tokens.
MAX_RECORD_BYTES = 2**20
RECORD_ID_BYTES = 16
_TEXT, _TOKENS = 1, 2
_MASK, _LABELS = 1, 2
_UPLOAD_ID = re.compile(r"[A-Za-z0-9_-]{8,64}")
_FIELDS = ("input_ids", "attention_mask", "labels")
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Record:
    """A text, or token ids with an optional mask (1 = real token) and labels (-100 = ignored), each [tokens].

    Raises:
        InvalidRequestError: empty, both, not integers, or of different lengths. It never repeats content.
    """

    text: str | None = None
    input_ids: Any = None
    attention_mask: Any = None
    labels: Any = None

    def __post_init__(self) -> None:
        if self.text is not None:
            _require(
                all(getattr(self, name) is None for name in _FIELDS), "a record is a text or token ids, not both"
            )
            _require(isinstance(self.text, str) and bool(self.text), "a text record is a string that is not empty")
            return
        _require(self.input_ids is not None, "a record has no input_ids")
        for name in _FIELDS:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _ints(name, value))
        ids = self.input_ids
        _require(ids.size > 0, "a record holds no token")
        _require(bool((ids >= 0).all()), "input_ids holds negative numbers")
        for name in _FIELDS[1:]:
            value = getattr(self, name)
            _require(value is None or value.shape == ids.shape, f"{name} is not as long as input_ids")
        mask, labels = self.attention_mask, self.labels
        _require(mask is None or bool(np.isin(mask, (0, 1)).all()), "attention_mask holds other values than 0 and 1")
        _require(
            labels is None or bool(((labels >= 0) | (labels == IGNORE_INDEX)).all()),
            f"labels holds negative numbers other than {IGNORE_INDEX}",
        )

    @classmethod
    def of(cls, value: Any) -> Record:
        """A record from what a person writes: a text, or a dict with input_ids, labels and attention_mask."""
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            return cls(text=value)
        if not isinstance(value, Mapping):
            raise _wrong(f"a record is a {type(value).__name__}; give texts, or dicts with input_ids")
        unknown = sorted(str(k) for k in set(value) - set(_FIELDS))
        _require(not unknown, f"a record has unknown keys {unknown[:3]}; known are {', '.join(_FIELDS)}")
        return cls(**value)

    def to_bytes(self) -> bytes:
        """The canonical bytes.

        Raises:
            InvalidRequestError: more than ``MAX_RECORD_BYTES``, or a text that is not Unicode.
        """
        if self.text is not None:
            try:
                data = bytes([_TEXT]) + self.text.encode()
            except UnicodeEncodeError as e:
                raise _wrong("a text record is not valid Unicode (it holds half a surrogate pair)") from e
        else:
            mask, labels = self.attention_mask, self.labels
            flags = (_MASK if mask is not None else 0) | (_LABELS if labels is not None else 0)
            data = bytes([_TOKENS, flags]) + self.input_ids.astype("<i4").tobytes()
            data += b"" if mask is None else mask.astype("u1").tobytes()
            data += b"" if labels is None else labels.astype("<i4").tobytes()
        if len(data) > MAX_RECORD_BYTES:
            raise _wrong(f"a record has {len(data)} bytes, over the {MAX_RECORD_BYTES} of one record; split it")
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> Record:
        """Read what ``to_bytes`` wrote; other bytes are refused.

        Raises:
            InvalidRequestError: not the canonical bytes of a record.
        """
        if len(data) > MAX_RECORD_BYTES:
            raise _wrong(f"a record has {len(data)} bytes, over the {MAX_RECORD_BYTES} of one record")
        if data[:1] == bytes([_TEXT]):
            try:
                return cls(text=data[1:].decode())
            except UnicodeDecodeError as e:
                raise _wrong("a text record is not UTF-8") from e
        _require(len(data) >= 2 and data[0] == _TOKENS and data[1] <= _MASK | _LABELS, "these bytes are no record")
        flags = data[1]
        width = 4 + (flags & _MASK != 0) + 4 * (flags & _LABELS != 0)
        tokens, rest = divmod(len(data) - 2, width)
        _require(rest == 0 and tokens > 0, "these bytes are no record")
        end = 2 + 4 * tokens
        fields: dict[str, Any] = {"input_ids": np.frombuffer(data[2:end], "<i4")}
        if flags & _MASK:
            fields["attention_mask"] = np.frombuffer(data[end : end + tokens], "u1")
            end += tokens
        if flags & _LABELS:
            fields["labels"] = np.frombuffer(data[end:], "<i4")
        return cls(**fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewDataset:
    """What is asked for when a dataset is registered.

    Attributes:
        upload_id: random, chosen by the client; makes every call of the upload repeatable.
        target_epsilon: inf is no limit.
        num_slots: privacy units among the records.

    Raises:
        InvalidRequestError: naming the field that cannot be.
    """

    upload_id: str
    dataset_id: str
    privacy_unit: str
    target_epsilon: float
    target_delta: float
    truncate: bool
    num_records: int
    num_slots: int

    def __post_init__(self) -> None:
        try:  # the rules of names, units and targets stand there
            DPConfig.model_validate(
                {
                    "dataset_id": self.dataset_id,
                    "privacy_unit": self.privacy_unit,
                    "target_epsilon": self.target_epsilon,
                    "target_delta": self.target_delta,
                }
            )
        except ValidationError as e:
            first = e.errors()[0]
            name = ".".join(str(p) for p in first["loc"]) or "dataset_id"
            text = first["msg"].removeprefix("Value error, ")
            raise InvalidRequestError(f"{name}: {text}", field=name, constraint=first["type"]) from e
        units = self.num_slots
        for name, holds, constraint in (
            ("upload_id", bool(_UPLOAD_ID.fullmatch(self.upload_id)), "8 to 64 of A-Z a-z 0-9 _ -"),
            ("records", 1 <= units <= self.num_records, "at least one record, and one for each privacy unit"),
            (
                "unit_ids",
                self.privacy_unit != "datum" or units == self.num_records,
                "none where a record is the unit",
            ),
            ("target_delta", units < 1 or self.target_delta < 1 / units, f"below 1 / {units} privacy units"),
        ):
            if not holds:
                raise InvalidRequestError(f"{name} must be: {constraint}", field=name, constraint=constraint)


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """A registered dataset as the server describes it.

    Attributes:
        num_slots: privacy units at registration; the sampling rate is expected batch / num_slots for ever.
        num_units, num_records: that are left after erasures.
        truncate: records longer than a run allows are cut; otherwise such a run is refused.
        target_epsilon: in force, after any raise; inf when there is none.
        epsilon_spent: by every run on the dataset, at ``target_delta``.
    """

    dataset_id: str
    privacy_unit: str
    num_slots: int
    num_units: int
    num_records: int
    truncate: bool
    target_epsilon: float
    target_delta: float
    epsilon_spent: float
    created: datetime


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Where a dataset's budget stands: epsilon spent and allowed, at delta."""

    dataset_id: str
    epsilon_spent: float
    target_epsilon: float
    target_delta: float


def _ints(name: str, value: Any) -> Ints:
    if hasattr(value, "detach"):  # torch, without importing it
        value = value.detach().cpu().numpy()
    try:
        array = np.asarray(value)
    except ValueError as e:
        raise _wrong(f"{name} of a record is not a list of integers") from e
    if array.dtype == np.bool_:
        array = array.astype(np.int32)
    whole = array.ndim == 1 and (np.issubdtype(array.dtype, np.integer) or array.size == 0)
    _require(whole, f"{name} of a record is not a list of integers")
    info = np.iinfo(np.int32)
    in_range = array.size == 0 or (int(array.min()) >= info.min and int(array.max()) <= info.max)
    _require(in_range, f"{name} of a record holds a number beyond 32 bits")
    return np.ascontiguousarray(array, dtype=np.int32)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise _wrong(message)


def _wrong(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, field="records", constraint="texts, or dicts of token lists")

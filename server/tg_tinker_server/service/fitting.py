"""Registered records as the engine takes them: token rows, batches within the limits, and what does not fit a run.

Shape suffixes: B records, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import IGNORE_INDEX, BatchData
from tg_tinker.types.records import Record

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PassLimits:
    """What one pass of this server takes; tokens with padding."""

    max_records: int
    max_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """One record as the engine takes it, each [tokens]."""

    slot: int
    ids_T: Ints  # noqa: N815 - shape suffix
    mask_T: Ints  # noqa: N815
    labels_T: Ints  # noqa: N815


@dataclass(frozen=True, slots=True, eq=False)
class DrawnBatch:
    """Part of a draw that fits one pass, with the privacy unit of each record. Units are never split."""

    batch: BatchData
    units: tuple[str, ...]


class Misfits:
    """Counts what does not fit a run; it never looks at what the records say."""

    def __init__(self, max_positions: int, vocab_size: int, limits: PassLimits) -> None:
        self._max_positions = max_positions
        self._vocab_size = vocab_size
        self._limits = limits
        self._records = self._long = self._foreign = self._empty = 0
        self._units: dict[int, tuple[int, int]] = {}  # slot -> records, longest

    def look_at(self, records: Sequence[Tokens]) -> None:
        """Take more records into the counts."""
        for r in records:
            size = int(r.ids_T.size)
            self._records += 1
            self._long += size > self._max_positions
            self._empty += size == 0
            outside = (r.ids_T >= self._vocab_size).any() or (r.labels_T >= self._vocab_size).any()
            self._foreign += bool(outside)
            count, longest = self._units.get(r.slot, (0, 0))
            self._units[r.slot] = count + 1, max(longest, size)

    def refuse(self, dataset_id: str, *, shown: bool) -> None:
        """Raise InvalidRequestError if anything does not fit. ``shown``: with the exact counts."""
        limits = self._limits
        large = sum(
            count > limits.max_records or count * longest > limits.max_tokens
            for count, longest in self._units.values()
        )
        for number, of, what, do in (
            (
                self._long,
                self._records,
                f"records are longer than the {self._max_positions} tokens of this run",
                "register the dataset with truncate=True, raise max_sequence_length, or split the records yourself",
            ),
            (
                self._foreign,
                self._records,
                f"records hold ids outside the model's vocabulary of {self._vocab_size}",
                "register ids of this model's tokenizer, or texts",
            ),
            (self._empty, self._records, "records have no token for this model", "erase them"),
            (
                large,
                len(self._units),
                f"privacy units do not fit one pass of {limits.max_records} records and "
                f"{limits.max_tokens} tokens with padding",
                "erase some of their records, or ask the operator to raise the limits",
            ),
        ):
            if number:
                text = f"{number} of {of} {what}" if shown else f"some {what}"
                raise InvalidRequestError(
                    f"dataset {dataset_id}: {text}; {do}. Nothing was drawn",
                    field="dataset",
                    constraint="every record fits the run",
                )


def packed(records: Sequence[Tokens], limits: PassLimits) -> Iterator[DrawnBatch]:
    """Cut a draw into batches within the limits (tokens with padding), short units first; never splits a unit."""
    units = [list(group) for _, group in groupby(sorted(records, key=lambda r: r.slot), key=lambda r: r.slot)]
    widths = [max(r.ids_T.size for r in unit) for unit in units]
    part: list[Tokens] = []
    for index in sorted(range(len(units)), key=lambda i: widths[i]):
        count = len(part) + len(units[index])
        if part and (count > limits.max_records or count * widths[index] > limits.max_tokens):
            yield _padded(part)
            part = []
        part += units[index]
    if part or not units:
        yield _padded(part)


def _padded(records: Sequence[Tokens]) -> DrawnBatch:
    width = max((r.ids_T.size for r in records), default=0)
    ids_BT, mask_BT = np.zeros((len(records), width), np.int64), np.zeros((len(records), width), np.int64)
    labels_BT = np.full((len(records), width), IGNORE_INDEX, np.int64)
    for i, r in enumerate(records):
        n = r.ids_T.size
        ids_BT[i, :n], mask_BT[i, :n], labels_BT[i, :n] = r.ids_T, r.mask_T, r.labels_T
    batch = BatchData(input_ids=ids_BT, attention_mask=mask_BT, labels=labels_BT)
    return DrawnBatch(batch, tuple(f"slot-{r.slot}" for r in records))


def as_tokens(slot: int, record: Record, encoded: Sequence[int] | None, limit: int | None) -> Tokens:
    """A record as token rows, cut to ``limit``; of a text come its ids. Without labels real tokens are targets."""
    ids = np.asarray(record.input_ids if encoded is None else encoded, dtype=np.int64)[:limit]
    mask = np.ones_like(ids) if record.attention_mask is None else record.attention_mask[:limit].astype(np.int64)
    labels = np.where(mask == 1, ids, IGNORE_INDEX) if record.labels is None else record.labels[:limit]
    return Tokens(slot, ids, mask, labels.astype(np.int64))

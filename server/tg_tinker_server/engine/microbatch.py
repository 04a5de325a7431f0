"""Cuts a batch into pieces that fit in memory, never splitting a privacy unit.

Shape suffixes: B records, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tg_tinker.types import IGNORE_INDEX
from tg_tinker_server.engine.backend import Ints, PassRequest

MOST_PADDING = 1.5
"""Joined rows may be this much larger, with padding, than each alone."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one run through the model may hold.

    Attributes:
        tokens: padding included.
        records: rows.
    """

    tokens: int
    records: int


def joins(shapes: Sequence[tuple[int, int]], shape: tuple[int, int], limits: Limits) -> bool:
    """Whether rows of one more shape (records, tokens) fit beside others, without much being spent on padding."""
    every = [*shapes, shape]
    records, width = sum(r for r, _ in every), max(w for _, w in every)
    useful = sum(r * w for r, w in every)
    return records <= limits.records and records * width <= min(limits.tokens, MOST_PADDING * useful)


def used_lengths(request: PassRequest) -> Ints:
    """Columns each record really needs [B]: up to its last real token or target, at least one."""
    used_BT = (request.attention_mask_BT != 0) | (request.labels_BT != IGNORE_INDEX)
    columns = np.arange(1, used_BT.shape[1] + 1)
    lengths: Ints = np.where(used_BT, columns, 0).max(axis=1, initial=1)
    return lengths


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """Records that go through the model together.

    Attributes:
        index: which records of the call.
        closes: whether every unit in it is complete with it; otherwise it is a part of one large unit.
    """

    index: Ints
    closes: bool = True


def plan(lengths_B: Ints, unit_of_B: Ints, *, max_tokens: int, max_records: int) -> list[MicroBatch]:
    """Cut a batch; the records of one unit are in one micro-batch, or in several of its own that follow each other.

    Units of similar length share a micro-batch, so little is computed on padding.
    """
    members: dict[int, list[int]] = {}
    for record, unit in enumerate(unit_of_B.tolist()):
        members.setdefault(unit, []).append(record)
    longest = {unit: max(int(lengths_B[i]) for i in records) for unit, records in members.items()}
    batches: list[MicroBatch] = []
    current: list[int] = []

    def close() -> None:
        if current:
            batches.append(MicroBatch(np.array(current, dtype=np.int64)))
            current.clear()

    for unit in sorted(members, key=lambda u: (longest[u], u)):
        records = members[unit]
        # Units come in rising length, so this one sets the width of the micro-batch it joins.
        most = max(1, min(max_records, max_tokens // longest[unit]))
        if len(current) + len(records) > most:
            close()
        if len(records) <= most:
            current.extend(records)
            continue
        for start in range(0, len(records), most):
            part = np.array(records[start : start + most], dtype=np.int64)
            batches.append(MicroBatch(part, closes=start + most >= len(records)))
    close()
    return batches

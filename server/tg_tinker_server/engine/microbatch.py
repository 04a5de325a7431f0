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


def joins(
    shapes: Sequence[tuple[int, int]], shape: tuple[int, int], limits: Limits, *, same_width: bool = False
) -> bool:
    """Whether rows of one more shape (records, tokens) fit beside others, without much being spent on padding."""
    every = [*shapes, shape]
    if same_width and len({w for _, w in every}) > 1:
        return False
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


def rung(length: int, most: int) -> int:
    """The width that a record of this length is computed at, whoever its neighbours are: 16, 24, 32, 48, 64, 96, ...

    Args:
        length: in tokens.
        most: of the model; no width is larger.
    """
    width = 16
    while width < length:
        width = width * 3 // 2 if width & (width - 1) == 0 else width * 4 // 3
    return max(length, min(width, most))


def plan(
    lengths_B: Ints, unit_of_B: Ints, *, max_tokens: int, max_records: int, kind_of_B: Ints | None = None
) -> list[MicroBatch]:
    """Cut a batch; the records of one unit are in one micro-batch, or in several of its own that follow each other.

    Units of similar length share a micro-batch, so little is computed on padding.

    Args:
        lengths_B: columns each record needs.
        unit_of_B: each record's unit.
        max_tokens: of a micro-batch, padding included.
        max_records: of a micro-batch.
        kind_of_B: records of different kinds never share a micro-batch; all records of a unit are of one kind.
    """
    members: dict[int, list[int]] = {}
    for record, unit in enumerate(unit_of_B.tolist()):
        members.setdefault(unit, []).append(record)
    longest = {unit: max(int(lengths_B[i]) for i in records) for unit, records in members.items()}
    kind = {unit: 0 if kind_of_B is None else int(kind_of_B[records[0]]) for unit, records in members.items()}
    batches: list[MicroBatch] = []
    current: list[int] = []
    current_kind = 0

    def close() -> None:
        if current:
            batches.append(MicroBatch(np.array(current, dtype=np.int64)))
            current.clear()

    for unit in sorted(members, key=lambda u: (kind[u], longest[u], u)):
        records = members[unit]
        # Units of a kind come in rising length, so this one sets the width of the micro-batch it joins.
        most = max(1, min(max_records, max_tokens // longest[unit]))
        if len(current) + len(records) > most or kind[unit] != current_kind:
            close()
        current_kind = kind[unit]
        if len(records) <= most:
            current.extend(records)
            continue
        for start in range(0, len(records), most):
            part = np.array(records[start : start + most], dtype=np.int64)
            batches.append(MicroBatch(part, closes=start + most >= len(records)))
    close()
    return batches

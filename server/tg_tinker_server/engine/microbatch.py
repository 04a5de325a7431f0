"""Cuts a batch into pieces that fit in memory, never splitting a privacy unit.

Shape suffixes: B records, T tokens.
"""

from __future__ import annotations

import numpy as np

from tg_tinker.types import IGNORE_INDEX
from tg_tinker_server.engine.backend import Ints, PassRequest


def used_lengths(request: PassRequest) -> Ints:
    """Columns each record really needs [B]: up to its last real token or target, at least one."""
    used_BT = (request.attention_mask_BT != 0) | (request.labels_BT != IGNORE_INDEX)
    columns = np.arange(1, used_BT.shape[1] + 1)
    lengths: Ints = np.where(used_BT, columns, 0).max(axis=1, initial=1)
    return lengths


def plan(lengths_B: Ints, unit_of_B: Ints, *, max_tokens: int, max_records: int) -> list[Ints]:
    """Record indices of each micro-batch; the records of one unit stay together.

    Units of similar length share a micro-batch, so little is computed on padding. A unit that is larger than
    the bounds gets a micro-batch of its own.
    """
    members: dict[int, list[int]] = {}
    for record, unit in enumerate(unit_of_B.tolist()):
        members.setdefault(unit, []).append(record)
    longest = {unit: max(int(lengths_B[i]) for i in records) for unit, records in members.items()}
    batches: list[Ints] = []
    current: list[int] = []
    for unit in sorted(members, key=lambda u: (longest[u], u)):
        size = len(current) + len(members[unit])
        # Units come in rising length, so this one sets the width of the micro-batch it joins.
        if current and (size * longest[unit] > max_tokens or size > max_records):
            batches.append(np.array(current, dtype=np.int64))
            current = []
        current.extend(members[unit])
    if current:
        batches.append(np.array(current, dtype=np.int64))
    return batches

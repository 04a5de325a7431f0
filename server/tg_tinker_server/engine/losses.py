"""Losses that depend on one record alone.

The mean over a batch's tokens couples records: removing one changes the weight of all others. Here each record is
averaged over its own targets, and records are summed.

Shape suffixes: B records, T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from tg_tinker.types import IGNORE_INDEX


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RecordLosses:
    """Next-token losses of each record, in nats, float32 [B]."""

    mean_B: torch.Tensor  # noqa: N815 - shape suffix; 0 for a record without targets
    sum_B: torch.Tensor  # noqa: N815
    targets_B: torch.Tensor  # noqa: N815


def record_losses(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> RecordLosses:
    """Cross-entropy of each record on its own targets; labels are shifted by one here, as in transformers."""
    logits = logits_BTV[:, :-1].float()
    labels = labels_BT[:, 1:]
    losses_BT = functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORE_INDEX, reduction="none"
    ).view(labels.shape)
    sum_B = losses_BT.sum(dim=1)
    targets_B = (labels != IGNORE_INDEX).sum(dim=1)
    return RecordLosses(mean_B=sum_B / targets_B.clamp(min=1), sum_B=sum_B, targets_B=targets_B)

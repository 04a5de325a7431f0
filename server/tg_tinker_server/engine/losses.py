"""Losses that depend on one record alone.

The mean over a batch's tokens couples records: removing one changes the weight of all others. Here each record is
averaged over its own targets, and records are summed.

Shape suffixes: B records, T tokens, V vocabulary, N targets, K alternatives of a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from tg_tinker.types import IGNORE_INDEX


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Targets:
    """The positions that are predicted, row by row."""

    row_N: torch.Tensor  # noqa: N815 - shape suffix; which record
    position_N: torch.Tensor  # noqa: N815 - from which position of it: one before the label's
    token_N: torch.Tensor  # noqa: N815 - what should follow; of datums [N, K]

    @classmethod
    def of(cls, labels_BT: torch.Tensor) -> Targets:
        """Every label that is not ignored; labels are shifted by one here, as in transformers."""
        row_N, position_N = (labels_BT[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
        return cls(row_N=row_N, position_N=position_N, token_N=labels_BT[row_N, position_N + 1])

    def select(self, values_BTD: torch.Tensor) -> torch.Tensor:
        """Values [B, T, D] at the predicting positions [N, D]."""
        flat_N = self.row_N * values_BTD.shape[1] + self.position_N
        return values_BTD.reshape(-1, values_BTD.shape[-1]).index_select(0, flat_N)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RecordLosses:
    """Next-token losses of each record, in nats, at least float32 [B]."""

    mean_B: torch.Tensor  # noqa: N815 - shape suffix; 0 for a record without targets
    sum_B: torch.Tensor  # noqa: N815
    targets_B: torch.Tensor  # noqa: N815

    def start(self, scales: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Where a backward pass starts, and with what, to get the gradient of means times ``scales``.

        ``None`` where no record has a target.
        """
        return (self.mean_B, self.mean_B.new_tensor(scales)) if bool(self.targets_B.any()) else None

    @classmethod
    def of_tokens(cls, losses_N: torch.Tensor, targets: Targets, records: int) -> RecordLosses:
        """Gather the losses of targets by record."""
        zeros_B = losses_N.new_zeros(records)
        sum_B = zeros_B.index_add(0, targets.row_N, losses_N)
        targets_B = torch.bincount(targets.row_N, minlength=records)
        return cls(mean_B=sum_B / targets_B.clamp(min=1), sum_B=sum_B, targets_B=targets_B)


def at_least_float32(values: torch.Tensor) -> torch.Tensor:
    """Half precision widened, anything else as it is."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def record_losses(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> RecordLosses:
    """Cross-entropy of each record on its own targets, from all logits."""
    targets = Targets.of(labels_BT)
    losses_N = functional.cross_entropy(
        at_least_float32(targets.select(logits_BTV)), targets.token_N, reduction="none"
    )
    return RecordLosses.of_tokens(losses_N, targets, len(labels_BT))


def log_probabilities(logits_BTV: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Of each alternative of each target [N, K], from all logits."""
    logprobs_NV = functional.log_softmax(at_least_float32(targets.select(logits_BTV)), dim=-1)
    return logprobs_NV.gather(1, targets.token_N)

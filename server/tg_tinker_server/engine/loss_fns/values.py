"""What a loss is of one datum: its value and how it changes with each log-probability.

Shape suffixes: N positions, K alternatives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tg_tinker.types.losses import CUSTOM

Array = npt.NDArray[Any]
Inputs = Mapping[str, Array]
MEAN = ":mean"
JUMPS = frozenset({"ppo", "gspo", CUSTOM})
"""Losses whose derivative may jump where a log-probability changes by no more than rounding: a gain that is clipped
or not, a comparison. Those of the others are continuous."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DatumLoss:
    """The loss of one datum.

    Attributes:
        value: summed over its positions; not finite where the loss is not.
        slope: d value / d log-probability, float64 in the shape of ``target_tokens``; ``None`` in evaluation.
        metrics: of a custom loss, by name with the reducer that joins them over datums (":sum" or ":mean").
    """

    value: float
    slope: npt.NDArray[np.float64] | None
    metrics: Mapping[str, float] = field(default_factory=dict)


def total(values: Sequence[float]) -> float:
    """The sum of losses, not finite if one of them is not."""
    with np.errstate(invalid="ignore", over="ignore"):
        return float(np.sum(np.asarray(values, dtype=np.float64)))


def joined_metrics(losses: Sequence[DatumLoss]) -> dict[str, float]:
    """Metrics of all datums: each by the reducer that its name ends with."""
    found: dict[str, list[float]] = {}
    for loss in losses:
        for name, value in loss.metrics.items():
            found.setdefault(name, []).append(value)
    return {name: total(v) / (len(losses) if name.endswith(MEAN) else 1) for name, v in found.items()}

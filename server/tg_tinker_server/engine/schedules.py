"""Learning-rate schedules: pure functions from the step's number to its rate."""

from __future__ import annotations

import math

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import OptimizerConfig

_KNOWN = frozenset({"total_steps", "num_cycles", "min_lr_ratio"})


def learning_rate_at(config: OptimizerConfig, *, step: int, max_steps: int | None) -> float:
    """Learning rate of the step numbered ``step`` (the first is 0).

    A warmup of w steps rises linearly and reaches the full rate at step w - 1. After it, over the steps up to
    ``total_steps`` (or ``max_steps``): "constant" stays; "linear" falls to ``min_lr_ratio`` times the rate;
    "cosine" falls along half a cosine (``num_cycles`` 0.5) to it; "cosine_with_restarts" does so
    ``num_cycles`` times.

    Raises:
        InvalidRequestError: an unknown schedule or setting.

    >>> config = OptimizerConfig(learning_rate=1.0, lr_scheduler="linear", warmup_steps=2)
    >>> [learning_rate_at(config, step=s, max_steps=4) for s in range(5)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    settings = config.lr_scheduler_kwargs
    unknown = sorted(set(settings) - _KNOWN)
    if unknown:
        raise InvalidRequestError(
            f"lr_scheduler_kwargs has unknown settings {unknown}; known: {sorted(_KNOWN)}",
            field="optimizer.lr_scheduler_kwargs",
            constraint="known settings only",
        )
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    total = int(settings.get("total_steps", max_steps if max_steps is not None else 0))
    span = max(1, total - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    floor = settings.get("min_lr_ratio", 0.0)
    return config.learning_rate * (floor + (1.0 - floor) * _shape(config, progress))


def _shape(config: OptimizerConfig, progress: float) -> float:
    """Height in [0, 1] at ``progress`` in [0, 1]."""
    kind, settings = config.lr_scheduler, config.lr_scheduler_kwargs
    if kind == "constant":
        return 1.0
    if kind == "linear":
        return 1.0 - progress
    if kind == "cosine":
        return 0.5 * (1.0 + math.cos(2.0 * math.pi * settings.get("num_cycles", 0.5) * progress))
    if kind == "cosine_with_restarts":
        if progress >= 1.0:
            return 0.0
        return 0.5 * (1.0 + math.cos(math.pi * (settings.get("num_cycles", 1.0) * progress % 1.0)))
    raise InvalidRequestError(
        f"unknown lr_scheduler {kind!r}", field="optimizer.lr_scheduler", constraint="a known schedule"
    )

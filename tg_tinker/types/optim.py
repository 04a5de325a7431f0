"""Settings of one optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tg_tinker.errors import InvalidRequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamParams:
    """AdamW for one step (Loshchilov and Hutter 2019); instead of what the run's configuration and schedule say.

    Attributes:
        learning_rate: of this step.
        beta1, beta2: decay of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        grad_clip_norm: L2 bound on the whole mean gradient, after noise; 0 is none.

    Raises:
        InvalidRequestError: naming what is out of range.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0

    def __post_init__(self) -> None:
        rules = (
            ("learning_rate", self.learning_rate >= 0, "0 or more"),
            ("beta1", 0 <= self.beta1 < 1, "from 0, below 1"),
            ("beta2", 0 <= self.beta2 < 1, "from 0, below 1"),
            ("eps", self.eps > 0, "above 0"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("grad_clip_norm", self.grad_clip_norm >= 0, "0 or more"),
        )
        for name, holds, constraint in rules:
            value = getattr(self, name)
            if not holds or not math.isfinite(value):
                raise InvalidRequestError(
                    f"{name}={value!r} is not possible; it must be {constraint}, and finite",
                    field=f"adam_params.{name}",
                    constraint=constraint,
                )

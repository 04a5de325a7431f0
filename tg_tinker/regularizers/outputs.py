"""What a custom loss and its regularizers came to."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseLoss:
    """The loss itself.

    Attributes:
        grad_norm: L2 norm of its gradient to the log-probabilities; ``None`` unless asked for.
        custom: its metrics.
    """

    value: float
    grad_norm: float | None = None
    custom: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RegularizerOutput:
    """One regularizer.

    Attributes:
        contribution: ``weight * value``, what it adds to the loss.
        grad_norm: L2 norm of its gradient to the log-probabilities; ``None`` unless asked for.
        grad_norm_weighted: times the weight.
        custom: its metrics.
    """

    name: str
    value: float
    weight: float
    contribution: float
    grad_norm: float | None = None
    grad_norm_weighted: float | None = None
    custom: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomLossOutput:
    """The composed loss: ``loss_total = base_loss.value + regularizer_total``.

    Attributes:
        total_grad_norm: L2 norm of the gradient of the whole; ``None`` unless asked for.
        regularizers: by name, in the order given.
    """

    loss_total: float
    base_loss: BaseLoss
    regularizer_total: float
    total_grad_norm: float | None = None
    regularizers: dict[str, RegularizerOutput] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain values; norms that were not asked for are left out."""
        base = self.base_loss
        return _present(
            loss_total=self.loss_total,
            base_loss=_present(value=base.value, grad_norm=base.grad_norm, custom=base.custom),
            regularizer_total=self.regularizer_total,
            total_grad_norm=self.total_grad_norm,
            regularizers={
                name: _present(
                    name=r.name,
                    value=r.value,
                    weight=r.weight,
                    contribution=r.contribution,
                    grad_norm=r.grad_norm,
                    grad_norm_weighted=r.grad_norm_weighted,
                    custom=r.custom,
                )
                for name, r in self.regularizers.items()
            },
        )

    def to_json(self) -> str:
        """The same as JSON text."""
        return json.dumps(self.to_dict())

    @classmethod
    def total(cls, parts: Sequence[CustomLossOutput]) -> CustomLossOutput:
        """Of losses computed on separate data: values add up, and norms as those of separate coordinates do.

        Custom metrics are left to whoever knows how theirs combine.
        """
        names = parts[0].regularizers if parts else {}
        return cls(
            loss_total=sum(p.loss_total for p in parts),
            base_loss=BaseLoss(
                value=sum(p.base_loss.value for p in parts), grad_norm=_norm([p.base_loss.grad_norm for p in parts])
            ),
            regularizer_total=sum(p.regularizer_total for p in parts),
            total_grad_norm=_norm([p.total_grad_norm for p in parts]),
            regularizers={
                name: RegularizerOutput(
                    name=name,
                    value=sum(p.regularizers[name].value for p in parts),
                    weight=names[name].weight,
                    contribution=sum(p.regularizers[name].contribution for p in parts),
                    grad_norm=_norm([p.regularizers[name].grad_norm for p in parts]),
                    grad_norm_weighted=_norm([p.regularizers[name].grad_norm_weighted for p in parts]),
                )
                for name in names
            },
        )


def _norm(norms: Sequence[float | None]) -> float | None:
    known = [n for n in norms if n is not None]
    return math.hypot(*known) if known else None


def _present(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}

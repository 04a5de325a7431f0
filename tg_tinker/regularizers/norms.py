"""Penalties on size: L1, L2, and the elastic net (Zou and Hastie 2005) of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from tg_tinker.regularizers.tensors import Reduction, choose, field_of, finite, reduced
from tg_tinker.types.datum import Datum

Target = Literal["logprobs", "probs", "field"]


class _Norm:
    """What is measured: the log-probabilities, the probabilities, or an input of the datums."""

    name = "norm"

    def __init__(
        self,
        target: Target = "logprobs",
        lambda_: float = 1.0,
        reduction: Reduction = "sum",
        *,
        field: str = "",
    ) -> None:
        choose("target", target, ("logprobs", "probs", "field"))
        choose("reduction", reduction, ("sum", "mean"))
        finite("lambda_", lambda_, least=0)
        if target == "field" or field:
            choose("target", target, ("field",))
            choose("field", bool(field), (True,))
        self.target, self.lambda_, self.reduction, self.field = target, lambda_, reduction, field

    def __call__(self, data: Sequence[Datum], logprobs: Sequence[Any]) -> tuple[Any, dict[str, float]]:
        """The penalty, and itself as a metric."""
        if self.target == "field":
            values = field_of(data, self.field)
        else:
            values = [x.exp() for x in logprobs] if self.target == "probs" else list(logprobs)
        value = self.lambda_ * self.measure([v.to(values[0].dtype) for v in values])
        return value, {self.name: float(value.detach())}

    compute = __call__

    def measure(self, values: Sequence[Any]) -> Any:
        """Of one tensor for each datum."""
        raise NotImplementedError


class L1(_Norm):
    """``lambda_`` times the sum (or mean) of absolute values.

    Args:
        target: "logprobs", "probs", or "field": an input named ``field``, which has no gradient.
    """

    name = "l1"

    def measure(self, values: Sequence[Any]) -> Any:
        """The sum or mean of |x|."""
        return reduced([v.abs() for v in values], self.reduction)


class L2(_Norm):
    """``lambda_`` times the sum (or mean) of squares.

    Args:
        center: subtracted first: "mean", each datum's own, or a number.
        clip: values are cut to [-clip, clip] before they are squared.
    """

    name = "l2"

    def __init__(
        self,
        target: Target = "logprobs",
        lambda_: float = 1.0,
        reduction: Reduction = "sum",
        *,
        center: Literal["mean"] | float | None = None,
        clip: float | None = None,
        field: str = "",
    ) -> None:
        super().__init__(target, lambda_, reduction, field=field)
        if center is not None and center != "mean":
            finite("center", center)
        if clip is not None:
            finite("clip", clip, above=0)
        self.center, self.clip = center, clip

    def measure(self, values: Sequence[Any]) -> Any:
        """The sum or mean of x^2."""
        if self.center is not None:
            values = [v - (v.mean() if self.center == "mean" else self.center) for v in values]
        if self.clip is not None:
            values = [v.clamp(-self.clip, self.clip) for v in values]
        return reduced([v.square() for v in values], self.reduction)


class ElasticNet(_Norm):
    """``lambda_ * (l1_ratio * L1 + (1 - l1_ratio) * L2)``."""

    name = "elastic_net"

    def __init__(
        self,
        target: Target = "logprobs",
        lambda_: float = 1.0,
        reduction: Reduction = "sum",
        *,
        l1_ratio: float = 0.5,
        field: str = "",
    ) -> None:
        super().__init__(target, lambda_, reduction, field=field)
        finite("l1_ratio", l1_ratio, least=0)
        finite("1 - l1_ratio", 1 - l1_ratio, least=0)
        self.l1_ratio = l1_ratio

    def measure(self, values: Sequence[Any]) -> Any:
        """Both, weighted."""
        absolute = reduced([v.abs() for v in values], self.reduction)
        squares = reduced([v.square() for v in values], self.reduction)
        return self.l1_ratio * absolute + (1 - self.l1_ratio) * squares

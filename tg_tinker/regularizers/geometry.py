"""Penalties on rows that resemble each other, and on the slope of a function of the log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from tg_tinker.errors import InvalidRequestError
from tg_tinker.regularizers.tensors import Reference, choose, finite, referred, torch_module
from tg_tinker.types.datum import Datum


class Orthogonality:
    """Penalty on the Gram matrix G of rows.

        soft      sum over i != j of G_ij^2, rows normalised
        hard      ||G - I||^2
        spectral  (trace G - n)^2 + sum over i != j of G_ij^2

    The rows are those of each datum of shape [N, K]; datums of shape [N] are one row each. Under differential
    privacy only rows of one unit ever meet: the loss is computed for each unit alone.
    """

    def __init__(self, mode: Literal["soft", "hard", "spectral"] = "soft") -> None:
        choose("mode", mode, ("soft", "hard", "spectral"))
        self.mode = mode

    def __call__(self, data: Sequence[Datum], logprobs: Sequence[Any]) -> tuple[Any, dict[str, float]]:  # noqa: ARG002
        """The penalty, and itself as a metric."""
        value = sum(self._of(rows) for rows in self._matrices(logprobs))
        return value, {"orthogonality": float(value.detach())}

    compute = __call__

    def _matrices(self, logprobs: Sequence[Any]) -> list[Any]:
        if all(x.ndim == 2 for x in logprobs):
            return list(logprobs)
        if len({tuple(x.shape) for x in logprobs}) > 1:
            raise InvalidRequestError(
                "the rows of Orthogonality have different lengths",
                field="logprobs",
                constraint="datums of one length, or of two dimensions",
            )
        return [torch_module().stack(list(logprobs))]

    def _of(self, rows: Any) -> Any:
        torch = torch_module()
        if self.mode == "soft":
            rows = rows / rows.square().sum(-1, keepdim=True).clamp_min(1e-24).sqrt()
        gram = rows @ rows.T
        unit = torch.eye(len(rows), dtype=gram.dtype)
        if self.mode == "hard":
            return (gram - unit).square().sum()
        off_diagonal = (gram * (1 - unit)).square().sum()
        return off_diagonal if self.mode == "soft" else (gram.trace() - len(rows)).square() + off_diagonal


class GradientPenalty:
    """``(||gradient of f|| - target)^2``, summed over datums (Gulrajani et al. 2017, improved training of WGANs).

    Args:
        f: of the log-probabilities of one datum to a scalar; default: their sum.
        interpolate: log-probabilities of a reference as in ``KL``: the gradient is taken between both.
        alpha: the share of the datum's own in that point; ``None``: drawn anew for each datum.
    """

    def __init__(
        self,
        f: Callable[[Any], Any] | None = None,
        target: float = 1.0,
        *,
        interpolate: Reference | None = None,
        alpha: float | None = None,
    ) -> None:
        finite("target", target, least=0)
        if alpha is not None:
            finite("alpha", alpha, least=0)
            finite("1 - alpha", 1 - alpha, least=0)
        self.f, self.target, self.interpolate, self.alpha = f or (lambda x: x.sum()), target, interpolate, alpha

    def __call__(self, data: Sequence[Datum], logprobs: Sequence[Any]) -> tuple[Any, dict[str, float]]:
        """The penalty; the mean norm as a metric."""
        torch = torch_module()
        points = list(logprobs)
        if self.interpolate is not None:
            points = [
                a * x + (1 - a) * y
                for x, y in zip(points, referred(self.interpolate, data, points), strict=True)
                for a in [torch.rand(()) if self.alpha is None else self.alpha]
            ]
        points = [p if p.requires_grad else p.detach().requires_grad_() for p in points]
        norms = torch.stack([self._slope(p) for p in points])
        return (norms - self.target).square().sum(), {"gradient_norm": float(norms.detach().mean())}

    compute = __call__

    def _slope(self, point: Any) -> Any:
        (gradient,) = torch_module().autograd.grad(self.f(point), point, create_graph=True)
        return gradient.square().sum().clamp_min(1e-24).sqrt()

"""Penalties on distributions: entropy, divergence from a reference, agreement with a pair.

A distribution lies along the last axis: a datum of shape [K] is one, a datum of shape [N, K] is N.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from tg_tinker.regularizers.tensors import Reduction, Reference, choose, finite, reduced, referred
from tg_tinker.types.datum import Datum


class Entropy:
    """``-H`` to maximize the entropy H = -sum p log p, ``+H`` to minimize it.

    Args:
        normalize: divide by the logarithm of the number of alternatives, so that a uniform distribution has 1.
        temperature: other than 1: log-probabilities are divided by it and normalised again.
    """

    def __init__(
        self,
        mode: Literal["maximize", "minimize"] = "maximize",
        reduction: Reduction = "mean",
        *,
        normalize: bool = False,
        temperature: float = 1.0,
    ) -> None:
        choose("mode", mode, ("maximize", "minimize"))
        choose("reduction", reduction, ("sum", "mean"))
        finite("temperature", temperature, above=0)
        self.mode, self.reduction, self.normalize, self.temperature = mode, reduction, normalize, temperature

    def __call__(self, data: Sequence[Datum], logprobs: Sequence[Any]) -> tuple[Any, dict[str, float]]:  # noqa: ARG002
        """The penalty; the entropy as a metric."""
        entropy = reduced([self._of(x) for x in logprobs], self.reduction)
        return (-entropy if self.mode == "maximize" else entropy), {"entropy": float(entropy.detach())}

    compute = __call__

    def _of(self, logprobs: Any) -> Any:
        if self.temperature != 1.0:
            logprobs = (logprobs / self.temperature).log_softmax(-1)
        entropy = -_weighted(logprobs.exp(), logprobs)
        alternatives = logprobs.shape[-1]
        return entropy / math.log(alternatives) if self.normalize and alternatives > 1 else entropy


class KL:
    """Divergence from a reference, with gradient: forward KL(P||Q), reverse KL(Q||P), symmetric: half of both.

    Args:
        reference: log-probabilities Q: the name of an input, a function of the data, or tensors, one for each datum.
            Under differential privacy they must be public or of the same unit.
    """

    def __init__(
        self,
        reference: Reference,
        direction: Literal["forward", "reverse", "symmetric"] = "forward",
        reduction: Reduction = "mean",
    ) -> None:
        choose("direction", direction, ("forward", "reverse", "symmetric"))
        choose("reduction", reduction, ("sum", "mean"))
        self.reference, self.direction, self.reduction = reference, direction, reduction

    def __call__(self, data: Sequence[Datum], logprobs: Sequence[Any]) -> tuple[Any, dict[str, float]]:
        """The penalty, and itself as a metric."""
        pairs = zip(logprobs, referred(self.reference, data, logprobs), strict=True)
        value = reduced([self._of(p, q) for p, q in pairs], self.reduction)
        return value, {"kl": float(value.detach())}

    compute = __call__

    def _of(self, p: Any, q: Any) -> Any:
        forward, reverse = _weighted(p.exp(), p - q), _weighted(q.exp(), q - p)
        return {"forward": forward, "reverse": reverse, "symmetric": (forward + reverse) / 2}[self.direction]


class Consistency:
    """Distance from a paired value: mean squared or absolute difference, 1 - cosine, or KL from it.

    Args:
        reference: the pair, as in ``KL``; usually the name of an input.
    """

    def __init__(
        self,
        reference: Reference,
        metric: Literal["mse", "l1", "cosine", "kl"] = "mse",
        reduction: Reduction = "mean",
    ) -> None:
        choose("metric", metric, ("mse", "l1", "cosine", "kl"))
        choose("reduction", reduction, ("sum", "mean"))
        self.reference, self.metric, self.reduction = reference, metric, reduction

    def __call__(self, data: Sequence[Datum], logprobs: Sequence[Any]) -> tuple[Any, dict[str, float]]:
        """The penalty, and itself as a metric."""
        pairs = zip(logprobs, referred(self.reference, data, logprobs), strict=True)
        value = reduced([self._of(x, y) for x, y in pairs], self.reduction)
        return value, {f"consistency_{self.metric}": float(value.detach())}

    compute = __call__

    def _of(self, x: Any, y: Any) -> Any:
        if self.metric == "cosine":
            norms = (x.square().sum(-1) * y.square().sum(-1)).clamp_min(1e-24).sqrt()
            return 1 - (x * y).sum(-1) / norms
        if self.metric == "kl":
            return _weighted(x.exp(), x - y)
        return (x - y).square() if self.metric == "mse" else (x - y).abs()


def _weighted(p: Any, x: Any) -> Any:
    """Sum of p x over the last axis; where p is 0 nothing is added, though x may be infinite."""
    return (p * x.masked_fill(p == 0, 0.0)).sum(-1)

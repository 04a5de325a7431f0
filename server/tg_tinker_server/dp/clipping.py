"""Bounds what one privacy unit can change: clip each unit's gradient, then sum.

Pure NumPy on float64; the torch engine uses ``clip_factors`` and repeats the two lines of the sum on its tensors.
Neighbouring datasets differ by adding or removing one unit. Source: Abadi et al. 2016, algorithm 1.

Shape suffixes: U units, P parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

MARGIN_64 = 1e-10
"""Relative room below the bound for gradients in float64: above the rounding of any norm."""
MARGIN_32 = 4.5e-6
"""The same for float32: the engine's norms are off by at most 3.9e-6 (``engine.grad_rows``), factors and products by
6e-8 each. Far below any effect."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ClippedSum:
    """A sum of clipped units and the norms they had before."""

    sum_P: Floats  # noqa: N815 - shape suffix
    norms_U: Floats  # noqa: N815


@dataclass(frozen=True, slots=True, kw_only=True)
class NormStats:
    """What the owner may see of the norms of one step; exact functions of private data."""

    mean_before: float
    mean_after: float
    num_clipped: int
    nonfinite: int


def clip_factors(norms_U: npt.NDArray[Any], *, max_grad_norm: float, margin: float = MARGIN_64) -> Floats:
    """Factor in [0, 1] for each unit's gradient, from its L2 norm.

    Args:
        norms_U: as computed, with at most ``margin`` of relative error.
        max_grad_norm: the bound.
        margin: room for rounding.

    Guarantees, for any input:
        * factor times norm is at most ``max_grad_norm``, with room for rounding;
        * a non-finite norm gets factor 0 (the caller must leave that row out: 0 * inf is NaN).
    """
    norms = np.asarray(norms_U, dtype=np.float64)
    bound = max_grad_norm * (1.0 - margin)
    factors = np.ones_like(norms)
    above = norms > bound
    factors[above] = bound / norms[above]
    factors[~np.isfinite(norms)] = 0.0
    return factors


def clip_and_sum(grads_UP: npt.NDArray[Any], *, max_grad_norm: float) -> ClippedSum:
    """Sum per-unit gradients, each scaled to L2 norm at most ``max_grad_norm``.

    Guarantees, for any input:
        * removing one row moves the result by at most ``max_grad_norm`` in L2;
        * a row whose norm is not finite contributes exactly zero, and its norm is reported as such.
    """
    grads = np.asarray(grads_UP, dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        # Row by row: NumPy adds a contiguous array pairwise, whose error hardly grows with its length.
        norms = np.sqrt(np.array([np.add.reduce(row * row) for row in grads], dtype=np.float64))
    finite = np.isfinite(norms)
    kept = grads if finite.all() else grads[finite]
    factors = clip_factors(norms, max_grad_norm=max_grad_norm)[finite]
    return ClippedSum(sum_P=factors @ kept, norms_U=norms)


def norm_stats(norms_U: npt.NDArray[Any], *, max_grad_norm: float) -> NormStats:
    """Summarise norms: means over the finite ones (0 without any), how many were clipped, how many not finite."""
    norms = np.asarray(norms_U, dtype=np.float64)
    finite = norms[np.isfinite(norms)]
    after = finite * clip_factors(finite, max_grad_norm=max_grad_norm)
    return NormStats(
        mean_before=math.fsum(finite) / max(1, finite.size),
        mean_after=math.fsum(after) / max(1, finite.size),
        num_clipped=int((finite > max_grad_norm).sum()),
        nonfinite=int(norms.size - finite.size),
    )

"""Is what was added to the clipped sums independent normal noise of the scale that was paid for?

Each test gives a p-value under the claim: independent normals of standard deviation noise_multiplier times C, larger
by at most ``ROUNDING_ROOM``.

Shape suffixes: S steps, P parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import fft, special, stats

from tg_tinker_server.dp.mechanism import ROUNDING_ROOM

Floats = npt.NDArray[np.float64]
_FEWEST_PRODUCTS = 40_000
"""A sum of so many products of two normals is normal enough at six standard deviations: its tail is off by 1 %."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistic:
    """A statistic of the noise, and the probability of one so extreme under the claim."""

    name: str
    figure: float
    p_value: float


def examine(noise_SP: Floats, signal_SP: Floats, *, stddev: float) -> list[Statistic]:
    """Every test of one run's noise.

    Args:
        noise_SP: what was added at each step, at least two steps.
        signal_SP: the clipped sums it was added to.
        stddev: what the ledger charged for, noise_multiplier times C.
    """
    z_SP = noise_SP / stddev
    return [
        *scale(z_SP),
        mean(z_SP),
        *shape(z_SP),
        between_steps(z_SP),
        *at_every_shift(z_SP),
        enters_once(z_SP, signal_SP / stddev),
    ]


def scale(z_SP: Floats) -> list[Statistic]:
    """Chi-square on the variance, once for too little and once for too much."""
    total, count = float(np.sum(z_SP * z_SP)), z_SP.size
    figure = math.sqrt(total / count)
    room = (1.0 + ROUNDING_ROOM) ** 2
    return [
        Statistic(name="less noise than paid for", figure=figure, p_value=float(stats.chi2.cdf(total, count))),
        Statistic(name="more noise than paid for", figure=figure, p_value=float(stats.chi2.sf(total / room, count))),
    ]


def mean(z_SP: Floats) -> Statistic:
    """The mean of all noise, in standard errors."""
    figure = float(np.sum(z_SP)) / math.sqrt(z_SP.size) / (1.0 + ROUNDING_ROOM)
    return Statistic(name="mean", figure=figure, p_value=_two_sided(figure))


def shape(z_SP: Floats) -> list[Statistic]:
    """Kolmogorov-Smirnov and Anderson-Darling against the normal, apart from the scale.

    The scale is that of the sample, which makes both statistics smaller than their reference: fewer false alarms.
    """
    rms = math.sqrt(float(np.mean(z_SP * z_SP)))
    if rms == 0.0:
        return [
            Statistic(name=name, figure=math.inf, p_value=0.0) for name in ("Kolmogorov-Smirnov", "Anderson-Darling")
        ]
    z = np.sort(z_SP, axis=None) / rms
    ks = stats.kstest(z, "norm", method="asymp")
    a_squared = anderson_darling(z)
    return [
        Statistic(name="Kolmogorov-Smirnov", figure=float(ks.statistic), p_value=float(ks.pvalue)),
        Statistic(name="Anderson-Darling", figure=a_squared, p_value=anderson_darling_tail(a_squared)),
    ]


def anderson_darling(sorted_z: Floats) -> float:
    """A squared, for a sorted sample against the standard normal."""
    n = len(sorted_z)
    weights = 2.0 * np.arange(1, n + 1) - 1.0
    logs = special.log_ndtr(sorted_z) + special.log_ndtr(-sorted_z[::-1])
    return float(-n - np.dot(weights, logs) / n)


def anderson_darling_tail(a_squared: float) -> float:
    """Probability of a larger A squared, for large samples (Marsaglia and Marsaglia 2004, off by at most 2e-6)."""
    z = a_squared
    if z <= 0.0:
        return 1.0
    if z < 2.0:
        series = 2.00012 + (0.247105 - (0.0649821 - (0.0347962 - (0.011672 - 0.00168691 * z) * z) * z) * z) * z
        return 1.0 - math.exp(-1.2337141 / z) / math.sqrt(z) * series
    if z > 100.0:  # far outside of the fit: the tail falls like exp(-z)
        return math.exp(-z)
    inner = (2.30695 - (0.43424 - (0.082433 - (0.008056 - 0.0003146 * z) * z) * z) * z) * z
    return -math.expm1(-math.exp(1.0776 - inner))


def between_steps(z_SP: Floats) -> Statistic:
    """The largest correlation of two steps, coordinate by coordinate: 1 where noise was used twice."""
    norms_S = np.linalg.norm(z_SP, axis=1)
    steps, coordinates = z_SP.shape
    if not norms_S.all():
        return Statistic(name="reused between steps", figure=1.0, p_value=0.0)
    first, second = np.triu_indices(steps, k=1)
    correlation_SS = (z_SP @ z_SP.T) / np.outer(norms_S, norms_S)
    largest = float(np.max(np.abs(correlation_SS[first, second])))
    p = min(1.0, len(first) * _two_sided(largest * math.sqrt(coordinates)))
    return Statistic(name="reused between steps", figure=largest, p_value=p)


def between_runs(first_SP: Floats, second_SP: Floats) -> Statistic:
    """The largest correlation of a step of one run with a step of another: 1 where a generator began anew."""
    norms = np.outer(np.linalg.norm(first_SP, axis=1), np.linalg.norm(second_SP, axis=1))
    if not norms.all():
        return Statistic(name="reused between runs", figure=1.0, p_value=0.0)
    largest = float(np.max(np.abs(first_SP @ second_SP.T / norms)))
    p = min(1.0, norms.size * _two_sided(largest * math.sqrt(first_SP.shape[1])))
    return Statistic(name="reused between runs", figure=largest, p_value=p)


def at_every_shift(z_SP: Floats) -> list[Statistic]:
    """The largest correlation between coordinates a fixed distance apart, within a step and from one to the next.

    It finds noise that repeats itself, and noise that is used again in another place, whatever the distance.
    """
    steps, coordinates = z_SP.shape
    norms_S = np.linalg.norm(z_SP, axis=1, keepdims=True)
    if not norms_S.all():
        return [
            Statistic(name="correlated within a step", figure=math.inf, p_value=0.0),
            Statistic(name="reused at a shift", figure=math.inf, p_value=0.0),
        ]
    size = fft.next_fast_len(2 * coordinates, real=True)
    within, across = np.zeros(size), np.zeros(size)
    previous = None
    for row in z_SP / (norms_S / math.sqrt(coordinates)):
        spectrum = fft.rfft(row, size)
        within += fft.irfft(spectrum * spectrum.conj(), size)
        if previous is not None:
            across += fft.irfft(previous * spectrum.conj(), size)
        previous = spectrum
    own = _shifts(coordinates, steps)
    pairs = _shifts(coordinates, steps - 1)
    backwards = -pairs[pairs > 0]
    both = np.concatenate([pairs, backwards])
    return [
        _largest("correlated within a step", within[own[own > 0]], steps * (coordinates - own[own > 0])),
        _largest("reused at a shift", across[both], (steps - 1) * (coordinates - np.abs(both))),
    ]


def _shifts(coordinates: int, steps: int) -> npt.NDArray[np.int64]:
    """Distances at which enough products are left."""
    return np.arange(max(1, coordinates - _FEWEST_PRODUCTS // max(1, steps)), dtype=np.int64)


def _largest(name: str, sums: Floats, products: npt.NDArray[np.int64]) -> Statistic:
    if not len(sums):
        return Statistic(name=name, figure=0.0, p_value=1.0)
    figure = float(np.max(np.abs(sums) / np.sqrt(products)))
    return Statistic(name=name, figure=figure, p_value=min(1.0, len(sums) * _two_sided(figure)))


def enters_once(z_SP: Floats, signal_SP: Floats) -> Statistic:
    """How often the clipped sum is in the release: 1 plus the noise's part along it.

    Noise is drawn after the sum is known, so its product with the sum is normal whatever the sum was.
    """
    energy = float(np.sum(signal_SP * signal_SP))
    if energy == 0.0:
        return Statistic(name="times the clipped sum is in it", figure=1.0, p_value=1.0)
    along = float(np.sum(z_SP * signal_SP))
    return Statistic(
        name="times the clipped sum is in it",
        figure=1.0 + along / energy,
        p_value=_two_sided(along / math.sqrt(energy) / (1.0 + ROUNDING_ROOM)),
    )


def follows_bound(first_SP: Floats, second_SP: Floats) -> Statistic:
    """F test: two runs' noise, each divided by its own bound, have the same variance."""
    one, other = float(np.mean(first_SP * first_SP)), float(np.mean(second_SP * second_SP))
    if one == 0.0 or other == 0.0:
        return Statistic(name="noise over C, at two bounds C", figure=math.inf, p_value=0.0)
    ratio = one / other
    f = stats.f(first_SP.size, second_SP.size)
    p = min(1.0, 2.0 * min(float(f.cdf(ratio)), float(f.sf(ratio))))
    return Statistic(name="noise over C, at two bounds C", figure=math.sqrt(ratio), p_value=p)


def _two_sided(z: float) -> float:
    return float(2.0 * stats.norm.sf(abs(z)))

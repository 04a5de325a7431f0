"""The cost of a noised step in the gate's integers, and what a total of them means in epsilon.

One home for the arithmetic that the server's gate charges by and that anybody who checks a ledger repeats. Renyi
divergence of the Poisson-sampled Gaussian (Mironov, Talwar and Zhang 2019, arXiv:1908.10530), converted by Balle et
al. 2020 (arXiv:1905.09982, Theorem 21). Neighbours differ by adding or removing one unit. Needs numpy alone.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Costs = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

ORDERS: Floats = np.array([1 + x / 10.0 for x in range(1, 100)] + list(range(12, 64)), dtype=np.float64)
UNITS = 2.0**40  # integer cost per unit of Renyi divergence
INFINITE = np.int64(2**61)  # costs saturate here; the sum of two must not wrap around an int64
_MARGIN = 1.0 + 1e-11  # float64 rounding inside the divergence
_REACH = 10.0  # standard deviations around each peak of the integrand; exp(-50) of it lies beyond
_SMALLEST_SIGMA = 0.01  # below it the grid would be long, and a bound without one is close
_ORDERS_AND_ONE = np.log1p(-1.0 / ORDERS)


def zero() -> Costs:
    """The cost of nothing."""
    return np.zeros(len(ORDERS), dtype=np.int64)


@lru_cache(maxsize=1024)
def step_costs(noise_multiplier: float, sample_rate: float) -> Costs:
    """Integer cost of one step at each of ``ORDERS``: never below the true divergence, and at least 1.

    Args:
        noise_multiplier: noise standard deviation over sensitivity, positive.
        sample_rate: probability with which each unit took part, on its own; 1 claims no amplification.

    Returns:
        shape [orders], read-only; ``INFINITE`` where the divergence is too large to count.
    """
    costs = np.empty(len(ORDERS), dtype=np.int64)
    for i, order in enumerate(ORDERS):
        rdp = divergence(noise_multiplier, sample_rate, float(order))
        if not math.isfinite(rdp) or rdp * UNITS * _MARGIN >= float(INFINITE) - 2:
            costs[i] = INFINITE
        else:
            # One unit more than the rounded-up value, for the absolute rounding error where the divergence is tiny.
            costs[i] = math.ceil(max(rdp, 0.0) * _MARGIN * UNITS) + 1
    costs.setflags(write=False)
    return costs


def repeated(costs: Costs, times: int) -> Costs:
    """The cost of the same step ``times`` times."""
    if times == 0:
        return zero()
    limit = int(INFINITE) // times
    product: Costs = np.where(costs > limit, INFINITE, np.minimum(costs, limit) * times)
    return product


def add(total: Costs, costs: Costs) -> Costs:
    """Composition: costs add up, saturating at infinity."""
    composed: Costs = np.minimum(total + costs, INFINITE)
    return composed


def epsilon(total: Costs, delta: float) -> float:
    """Epsilon at ``delta`` for a total cost; inf when nothing finite can be promised, 0 for nothing released."""
    if not total.any():
        return 0.0
    if delta <= 0.0:
        return math.inf  # Gaussian noise promises nothing without a delta
    values = total / UNITS - (math.log(delta) + np.log(ORDERS)) / (ORDERS - 1.0) + _ORDERS_AND_ONE
    best = float(np.min(np.where(total >= INFINITE, np.inf, values)))
    return max(0.0, best)


def divergence(noise_multiplier: float, sample_rate: float, order: float) -> float:
    """Renyi divergence of one step at ``order`` > 1, to about 1e-13, relative or absolute, whichever is more.

    The larger of the two directions, which is that of the mixture from the plain Gaussian (Mironov et al., Theorem
    5). inf where float64 cannot hold it.
    """
    sigma, rate = noise_multiplier, sample_rate
    whole = order / (2.0 * sigma) / sigma if sigma > 1e-150 else math.inf
    if rate >= 1.0 or not math.isfinite(whole):
        return whole
    if sigma < _SMALLEST_SIGMA:
        # The divergence's exponential is jointly convex: that of a mixture is at most the mixture's.
        return float(np.logaddexp(math.log1p(-rate), math.log(rate) + whole * (order - 1.0))) / (order - 1.0)
    return _log_moment(sigma, rate, order) / (order - 1.0)


def _log_moment(sigma: float, rate: float, order: float) -> float:
    """log E[(1 - q + q exp((2 z - 1) / (2 sigma^2)))^order] over z ~ N(0, sigma^2), by the trapezoid rule.

    The rule converges exponentially for integrands that are analytic in a strip (Trefethen and Weideman 2014). This
    one is, to a distance of pi sigma^2 from the real line, where 1 - q + q exp(...) vanishes; in u = z / sigma a step
    of sigma / 2 leaves an error of exp(-4 pi^2), which is 7e-18.
    """
    width = min(sigma, 0.5) / 2.0
    u = _grid(sigma, order, width)
    exponent = u / sigma - 0.5 / sigma / sigma
    log_ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + exponent)
    log_density = -0.5 * u * u + math.log(width / math.sqrt(2.0 * math.pi))
    log_terms = order * log_ratio + log_density
    top = float(log_terms.max())
    total = top + math.log(float(np.exp(log_terms - top).sum()))
    if total > 0.1:
        return total
    # Near 1 the moment is 1 plus little, and what is little must not be lost: sum the excess over the first two terms
    # of the power, 1 + order * shift, whose expectation is 1 because the expected shift is 0.
    density = np.exp(log_density)
    shift = rate * np.expm1(np.minimum(exponent, 700.0))
    near = order * log_ratio < 1.0
    excess = np.where(
        near,
        (np.expm1(np.minimum(order * log_ratio, 1.0)) - order * shift) * density,
        np.exp(log_terms) - density - order * shift * density,
    )
    return math.log1p(max(0.0, float(excess.sum())))


def _grid(sigma: float, order: float, width: float) -> Floats:
    """Multiples of ``width`` around the two places where the integrand can weigh anything: 0 and order / sigma.

    The mixture's power is a sum of shift^k, each times the density a Gaussian around k / sigma. A term at
    v = k / sigma lies below one of the two ends by exp(-v (order / sigma - v) / 2) times the number of ways to choose
    k of the order. Where the ends are far apart that is nothing, and so is what lies at 2 / sigma for orders near 1
    and rates below 1e-16. Where they are near, all between them is summed: at sigma 3 and order 63 it weighs up to
    3e-7 of the whole.
    """
    last_peak = order / sigma
    low, high = math.floor(-_REACH / width), math.ceil((last_peak + _REACH) / width)
    if last_peak <= 4.0 * _REACH:
        return width * np.arange(low, high + 1, dtype=np.float64)
    around_zero = np.arange(low, -low + 1, dtype=np.float64)
    around_last = np.arange(math.floor((last_peak - _REACH) / width), high + 1, dtype=np.float64)
    return width * np.concatenate([around_zero, around_last])

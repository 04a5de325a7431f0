"""From events to epsilon: Renyi costs as rounded-up integers, folded; independent accountants beside them.

Renyi DP (Mironov 2017; Mironov, Talwar and Zhang 2019 for the sampled Gaussian) on Opacus's orders, converted
by Balle et al. 2020, Theorem 21. Neighbours differ by adding or removing one unit.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from opacus.accountants import GaussianAccountant, PRVAccountant, RDPAccountant
from opacus.accountants.analysis.rdp import compute_rdp

from tg_tinker_server.dp.events import Event, Gaussian, ParticipationGaussian, SampledGaussian, Unnoised

Costs = npt.NDArray[np.int64]
ORDERS = np.array(RDPAccountant.DEFAULT_ALPHAS, dtype=np.float64)
UNITS = 2.0**40  # integer cost per unit of Renyi divergence
INFINITE = np.int64(2**61)  # costs saturate here; the sum of two must not wrap around an int64
_MARGIN = 1.0 + 1e-11  # float64 rounding inside the Renyi formula
_PRV_ERROR = 0.01  # added to epsilon, which makes the result a bound
_PRV_CELLS = 1e6  # largest grid: one to two seconds and 200 MB
_PLD_RELEASES = 1_000_000  # of one kind; dp_accounting needs minutes for ten times as many
_PLD_CELLS = 1e5  # of epsilon; a coarser grid only makes the pessimistic result larger


def zero() -> Costs:
    """The cost of nothing."""
    return np.zeros(len(ORDERS), dtype=np.int64)


@lru_cache(maxsize=256)
def _costs(noise_multiplier: float, sample_rate: float) -> Costs:
    costs = np.empty(len(ORDERS), dtype=np.int64)
    for i, order in enumerate(ORDERS):
        try:
            rdp = float(compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=float(order)))
        except (ValueError, OverflowError, ZeroDivisionError):
            rdp = math.inf  # the series does not converge in float64: this order proves nothing
        if not math.isfinite(rdp) or rdp * UNITS * _MARGIN >= float(INFINITE) - 2:
            costs[i] = INFINITE
        else:
            # One unit more than the rounded-up value, since for tiny rates the formula itself rounds to zero.
            costs[i] = math.ceil(max(rdp, 0.0) * _MARGIN * UNITS) + 1
    costs.setflags(write=False)
    return costs


def cost(event: Event) -> Costs:
    """Integer cost of one event at each order, rounded up; never below the true Renyi divergence."""
    match event:
        case Gaussian():
            return _costs(event.noise_multiplier, 1.0)
        case SampledGaussian():
            return _costs(event.noise_multiplier, event.sample_rate)
        case ParticipationGaussian():
            return repeated(_costs(event.noise_multiplier, 1.0), event.releases)
        case Unnoised():
            return np.full(len(ORDERS), INFINITE)
    raise TypeError(f"{type(event).__name__} has no cost")


def repeated(costs: Costs, times: int) -> Costs:
    """The cost of the same event ``times`` times."""
    if times == 0:
        return zero()
    limit = int(INFINITE) // times
    product: Costs = np.where(costs > limit, INFINITE, np.minimum(costs, limit) * times)
    return product


def add(total: Costs, costs: Costs) -> Costs:
    """Composition: costs add up, saturating at infinity."""
    composed: Costs = np.minimum(total + costs, INFINITE)
    return composed


_CONVERSION = np.log1p(-1.0 / ORDERS)


def epsilon(total: Costs, delta: float) -> float:
    """Epsilon at ``delta`` for a total cost; inf when nothing finite can be promised, 0 for nothing released."""
    if not total.any():
        return 0.0
    if delta <= 0.0:
        return math.inf  # Gaussian noise promises nothing without a delta
    values = total / UNITS - (math.log(delta) + np.log(ORDERS)) / (ORDERS - 1.0) + _CONVERSION
    best = float(np.min(np.where(total >= INFINITE, np.inf, values)))
    return max(0.0, best)


def _as_gaussian(event: Event) -> tuple[float, float, int] | None:
    match event:
        case Gaussian():
            return event.noise_multiplier, 1.0, 1
        case SampledGaussian():
            return event.noise_multiplier, event.sample_rate, 1
        case ParticipationGaussian():
            return event.noise_multiplier, 1.0, event.releases
        case Unnoised():
            return None
    raise TypeError(f"{type(event).__name__} is not known")


def histogram(events: Iterable[Event]) -> dict[tuple[float, float], int] | None:
    """How often each (noise_multiplier, sample_rate) was released; ``None`` after an un-noised release."""
    counts: dict[tuple[float, float], int] = {}
    for event in events:
        known = _as_gaussian(event)
        if known is None:
            return None
        sigma, rate, times = known
        if times:
            counts[sigma, rate] = counts.get((sigma, rate), 0) + times
    return counts


@lru_cache(maxsize=4096)
def prv_epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """Upper bound on epsilon by PRV (Gopi et al. 2021, Opacus), error 0.01, for parameters fixed in advance.

    inf where its grid would be too large or its numerics give up: that is no bound, and the Renyi bound has to do.
    Takes tens of milliseconds for an epsilon near 1, and up to two seconds.
    """
    if steps == 0:
        return 0.0
    by_renyi = epsilon(repeated(_costs(noise_multiplier, sample_rate), steps), delta)
    cells = 2.5 * (by_renyi + 3.0) * math.sqrt(steps / 2 * math.log(12_000 / delta)) / _PRV_ERROR
    if not cells <= _PRV_CELLS:
        return math.inf
    accountant = PRVAccountant()
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    try:
        with np.errstate(divide="ignore"), warnings.catch_warnings():  # log of zero at rate 1 is the -inf it means
            warnings.simplefilter("ignore", UserWarning)  # of the order used to choose the grid, which only sizes it
            bound = float(accountant.get_epsilon(delta, eps_error=_PRV_ERROR))
    except (ArithmeticError, ValueError, RuntimeError):
        return math.inf
    return bound if bound >= 0.0 else math.inf


@lru_cache(maxsize=256)
def pld_delta(noise_multiplier: float, sample_rate: float, steps: int, at_epsilon: float) -> float:
    """Upper bound on delta at ``at_epsilon`` after ``steps`` equal releases (dp_accounting, pessimistic)."""
    composed = _pld({(noise_multiplier, sample_rate): steps})
    return 1.0 if composed is None else min(1.0, float(composed.get_delta(at_epsilon)))


def pld_epsilon(events: Sequence[Event], delta: float) -> float:
    """Epsilon by privacy loss distributions (dp_accounting, pessimistic): the independent second answer.

    inf after an un-noised release, and where the distribution cannot be computed.
    """
    counts = histogram(events)
    if counts is None:
        return math.inf
    if not counts:
        return 0.0
    composed = _pld(counts)
    return math.inf if composed is None else float(composed.get_epsilon(delta))


def _pld(counts: Mapping[tuple[float, float], int]) -> PLDAccountant | None:
    """The composed loss distribution; ``None`` for too little noise or too many releases to hold it in memory."""
    total = zero()
    for (sigma, rate), times in counts.items():
        total = add(total, repeated(_costs(sigma, rate), times))
    scale = epsilon(total, 1e-10)
    if not math.isfinite(scale) or max(counts.values(), default=0) > _PLD_RELEASES:
        return None
    accountant = PLDAccountant(value_discretization_interval=max(1e-4, scale / _PLD_CELLS))
    for (sigma, rate), times in counts.items():
        gaussian = dp_event.GaussianDpEvent(sigma)
        released = gaussian if rate == 1.0 else dp_event.PoissonSampledDpEvent(rate, gaussian)
        accountant.compose(dp_event.SelfComposedDpEvent(released, times))
    return accountant


def gdp_estimate(events: Sequence[Event], delta: float) -> float | None:
    """Opacus's central-limit estimate. NOT an upper bound; ``None`` where it does not apply."""
    counts = histogram(events)
    if counts is None or len(counts) != 1:
        return None
    ((sigma, rate), times), *_ = counts.items()
    with warnings.catch_warnings():  # Opacus warns of what this function's name and docstring say
        warnings.simplefilter("ignore", UserWarning)
        accountant = GaussianAccountant()
    accountant.history = [(sigma, rate, times)]
    try:
        with np.errstate(over="ignore"):
            estimate = float(accountant.get_epsilon(delta))
    except (ArithmeticError, ValueError, RuntimeError):  # too little noise for the central limit to say anything
        return None
    return estimate if math.isfinite(estimate) else None

"""From events to epsilon: Renyi costs as rounded-up integers, folded; independent accountants beside them.

Renyi DP (Mironov 2017; Mironov, Talwar and Zhang 2019 for the sampled Gaussian) on Opacus's orders, converted
by Balle et al. 2020, Theorem 21. Neighbours differ by adding or removing one unit.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from opacus.accountants import GaussianAccountant, PRVAccountant, RDPAccountant
from opacus.accountants.analysis.rdp import _compute_rdp

from tg_tinker_server.dp.events import Event, Gaussian, ParticipationGaussian, SampledGaussian, Unnoised

Costs = npt.NDArray[np.int64]
ORDERS = np.array(RDPAccountant.DEFAULT_ALPHAS, dtype=np.float64)
UNITS = 2.0**40  # integer cost per unit of Renyi divergence
INFINITE = np.int64(2**61)  # costs saturate here; the sum of two must not wrap around an int64
_MARGIN = 1.0 + 1e-11  # float64 rounding inside the Renyi formula


def zero() -> Costs:
    """The cost of nothing."""
    return np.zeros(len(ORDERS), dtype=np.int64)


@lru_cache(maxsize=256)
def _costs(noise_multiplier: float, sample_rate: float) -> Costs:
    costs = np.empty(len(ORDERS), dtype=np.int64)
    for i, order in enumerate(ORDERS):
        try:
            rdp = float(_compute_rdp(sample_rate, noise_multiplier, float(order)))
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

    inf where its numerics give up: that is no bound, and the Renyi bound has to do. Takes up to a second.
    """
    if steps == 0:
        return 0.0
    accountant = PRVAccountant()
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    try:
        with np.errstate(divide="ignore"):  # log of zero at rate 1 is the -inf it means
            bound = float(accountant.get_epsilon(delta, eps_error=0.01))
    except (ArithmeticError, ValueError, RuntimeError, MemoryError):
        return math.inf
    return bound if bound >= 0.0 else math.inf


@lru_cache(maxsize=256)
def pld_delta(noise_multiplier: float, sample_rate: float, steps: int, at_epsilon: float) -> float:
    """Upper bound on delta at ``at_epsilon`` after ``steps`` equal releases (dp_accounting, pessimistic)."""
    accountant = _pld_accountant()
    accountant.compose(_dp_event(noise_multiplier, sample_rate, steps))
    return float(accountant.get_delta(at_epsilon))


def pld_epsilon(events: Sequence[Event], delta: float) -> float:
    """Epsilon by privacy loss distributions (dp_accounting, pessimistic): the independent second answer."""
    counts = histogram(events)
    if counts is None:
        return math.inf
    if not counts:
        return 0.0
    accountant = _pld_accountant()
    for (sigma, rate), times in counts.items():
        accountant.compose(_dp_event(sigma, rate, times))
    return float(accountant.get_epsilon(delta))


def _pld_accountant() -> PLDAccountant:
    return PLDAccountant(value_discretization_interval=1e-3)


def _dp_event(noise_multiplier: float, sample_rate: float, times: int) -> dp_event.DpEvent:
    gaussian = dp_event.GaussianDpEvent(noise_multiplier)
    released = gaussian if sample_rate == 1.0 else dp_event.PoissonSampledDpEvent(sample_rate, gaussian)
    return dp_event.SelfComposedDpEvent(released, times)


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
    return float(accountant.get_epsilon(delta))

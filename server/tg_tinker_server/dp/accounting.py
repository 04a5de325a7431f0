"""From events to epsilon: Renyi costs as rounded-up integers, folded; independent accountants beside them.

The integers and their conversion are ``tg_tinker.privacy.renyi``'s, so that whoever checks a ledger adds up the very
numbers that the gate did. Neighbours differ by adding or removing one unit.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
from opacus.accountants import GaussianAccountant, PRVAccountant

from tg_tinker.privacy.accounting import loss_distribution
from tg_tinker.privacy.renyi import INFINITE, ORDERS, UNITS, Costs, add, epsilon, repeated, step_costs, zero
from tg_tinker_server.dp.events import Event, Gaussian, ParticipationGaussian, SampledGaussian, Unnoised

__all__ = [
    "INFINITE", "ORDERS", "UNITS", "Costs", "add", "cost", "epsilon", "gdp_estimate", "histogram", "pld_delta",
    "pld_epsilon", "prv_epsilon", "repeated", "zero",
]  # fmt: skip

_PRV_ERROR = 0.01  # added to epsilon, which makes the result a bound
_PRV_CELLS = 1e6  # largest grid: one to two seconds and 200 MB
_PRV_ROUNDING = 32 * 2.0**-53  # of delta, for each step; ten times what its Fourier transform was measured to lose


def cost(event: Event) -> Costs:
    """Integer cost of one event at each order, rounded up; never below the true Renyi divergence."""
    match event:
        case Gaussian():
            return step_costs(event.noise_multiplier, 1.0)
        case SampledGaussian():
            return step_costs(event.noise_multiplier, event.sample_rate)
        case ParticipationGaussian():
            return repeated(step_costs(event.noise_multiplier, 1.0), event.releases)
        case Unnoised():
            return np.full(len(ORDERS), INFINITE)
    raise TypeError(f"{type(event).__name__} has no cost")


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

    inf where its grid would be too large, its numerics give up, or delta is so small for so many steps that rounding
    would decide: that is no bound, and the Renyi bound has to do. Takes tens of milliseconds for an epsilon near 1,
    and up to two seconds.
    """
    if steps == 0:
        return 0.0
    rounding = steps * _PRV_ROUNDING
    if rounding > delta / 2:
        return math.inf
    by_renyi = epsilon(repeated(step_costs(noise_multiplier, sample_rate), steps), delta)
    cells = 2.5 * (by_renyi + 3.0) * math.sqrt(steps / 2 * math.log(12_000 / delta)) / _PRV_ERROR
    if not cells <= _PRV_CELLS:
        return math.inf
    accountant = PRVAccountant()
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    try:
        with np.errstate(divide="ignore"), warnings.catch_warnings():  # log of zero at rate 1 is the -inf it means
            warnings.simplefilter("ignore", UserWarning)  # of the order used to choose the grid, which only sizes it
            bound = float(accountant.get_epsilon(delta - rounding, eps_error=_PRV_ERROR))
    except (ArithmeticError, ValueError, RuntimeError):
        return math.inf
    return bound if bound >= 0.0 else math.inf


@lru_cache(maxsize=256)
def pld_delta(noise_multiplier: float, sample_rate: float, steps: int, at_epsilon: float) -> float:
    """Upper bound on delta at ``at_epsilon`` after ``steps`` equal releases (dp_accounting, pessimistic)."""
    composed = loss_distribution({(noise_multiplier, sample_rate): steps})
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
    composed = loss_distribution(counts)
    return math.inf if composed is None else float(composed.get_epsilon(delta))


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

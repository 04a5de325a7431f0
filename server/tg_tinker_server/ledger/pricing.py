"""What the next release would cost: epsilon of a fold before and after, and by which accountant.

The gate is a Renyi filter, valid for events chosen along the way. A run that fixed its schedule in advance and is
alone on its dataset may be priced by PRV instead, which is tighter. Should anything else be released there later,
PRV's promise and the filter's stand side by side, and each must take its own share of delta: the planned
run's is what its WHOLE plan could use at the target it began under, whether or not it was finished. At a target
raised later it could use less, so that share covers both, and what was spent does not fall.
"""

from __future__ import annotations

from dataclasses import dataclass

from tg_tinker.errors import DPBudgetExceededError
from tg_tinker_server.dp import calibration
from tg_tinker_server.dp.accounting import add, cost, epsilon, pld_delta, prv_epsilon, repeated
from tg_tinker_server.dp.calibration import Forecast
from tg_tinker_server.dp.events import Event, Gaussian, SampledGaussian
from tg_tinker_server.ledger.fold import Fold, Terms


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """Epsilon of the dataset before and after a release, at its delta; ``accountant`` is "rdp" or "prv"."""

    before: float
    after: float
    accountant: str


def epsilon_now(fold: Fold, terms: Terms) -> float:
    """Epsilon of everything charged so far, settled or not."""
    if fold.charges and fold.by_plan_alone:
        return _planned(fold, terms, 0)
    return epsilon(fold.total, filter_delta(fold, terms))


def price(fold: Fold, terms: Terms, event: Event, *, run_id: str, accountant: str) -> Price:
    """The price of one release, whether or not it can be afforded."""
    before = epsilon_now(fold, terms)
    if accountant == "prv" and fold.follows_plan(run_id, event):
        return Price(before=before, after=_planned(fold, terms, 1), accountant="prv")
    after = epsilon(add(fold.total, cost(event)), filter_delta(fold, terms))
    return Price(before=before, after=after, accountant="rdp")


def refuse_over(found: Price, terms: Terms, dataset_id: str) -> None:
    """Stop a release that goes over the target.

    Raises:
        DPBudgetExceededError: with the numbers.
    """
    target = terms.target_epsilon
    if target is None or found.after <= target:
        return
    digits = next((d for d in (3, 6, 9) if f"{found.after:.{d}f}" != f"{target:.{d}f}"), 12)
    raise DPBudgetExceededError(
        f"step would bring {dataset_id} to epsilon {found.after:.{digits}f}, over its {target:.{digits}f} at delta "
        f"{terms.target_delta:g}; nothing was released. Stop here, or use fresh data",
        current_epsilon=found.before,
        max_epsilon=target,
        delta=terms.target_delta,
    )


def forecast(
    fold: Fold, terms: Terms, event: Event, *, run_id: str, accountant: str, steps: int, most: int | None
) -> Forecast:
    """Epsilon now, after ``steps`` more releases, and how many the target allows (-1 without one).

    Exactly what :func:`price` will say step by step. ``most``: how many of them can still be charged at all.
    """
    charged = steps if most is None else min(steps, most)
    planned = 0
    if accountant == "prv" and fold.follows_plan(run_id, event) and fold.plan is not None:
        planned = fold.plan.steps - fold.planned
    delta = _after_plan(fold, terms) if planned else filter_delta(fold, terms)
    if planned and charged <= planned:
        after = _planned(fold, terms, charged)
    elif charged:
        after = epsilon(add(fold.total, repeated(cost(event), charged)), delta)
    else:
        after = epsilon_now(fold, terms)
    return Forecast(
        epsilon_now=epsilon_now(fold, terms),
        epsilon_after=after,
        steps_remaining=_remaining(fold, terms, event, planned, delta),
        delta=terms.target_delta,
    )


def _remaining(fold: Fold, terms: Terms, event: Event, planned: int, delta: float) -> int:
    target = terms.target_epsilon
    if target is None:
        return -1
    if planned and _planned(fold, terms, planned) > target:
        low, high = 0, planned
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if _planned(fold, terms, middle) <= target else (low, middle)
        return low
    by_filter = calibration.steps_remaining(fold.total, event, target_epsilon=target, delta=delta)
    return max(planned, by_filter)


def filter_delta(fold: Fold, terms: Terms) -> float:
    """The delta that the Renyi filter may use: all of it, unless a PRV plan was begun; 0 if the plan takes it all."""
    return _after_plan(fold, terms) if fold.planned else terms.target_delta


def _after_plan(fold: Fold, terms: Terms) -> float:
    plan = fold.plan
    if plan is None or plan.target_epsilon is None:
        return terms.target_delta
    sigma, rate = _parameters(plan.event)
    return max(0.0, terms.target_delta - pld_delta(sigma, rate, plan.steps, plan.target_epsilon))


def _planned(fold: Fold, terms: Terms, more: int) -> float:
    """Epsilon of the plan's releases and ``more``. Both bounds depend on the count alone, so the lower one holds."""
    assert fold.plan is not None
    sigma, rate = _parameters(fold.plan.event)
    by_filter = epsilon(add(fold.total, repeated(cost(fold.plan.event), more)), terms.target_delta)
    return min(by_filter, prv_epsilon(sigma, rate, fold.planned + more, terms.target_delta))


def _parameters(event: Gaussian | SampledGaussian) -> tuple[float, float]:
    return event.noise_multiplier, event.sample_rate if isinstance(event, SampledGaussian) else 1.0

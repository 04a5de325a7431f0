"""Epsilon of a history, computed again: what each charge cost by the gate, and what others say of all of them.

A charge by the gate has one right answer, to float64 rounding. A charge by PRV has none here, since that accountant
comes with the server; it must lie between the privacy loss distribution of the same releases and the gate's value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from tg_tinker.ledger.history import Charge, History
from tg_tinker.ledger.releases import Release, histogram
from tg_tinker.privacy import accounting, renyi
from tg_tinker.reports.statement import Figures, profile_deltas, thinned

TOLERANCE: Final = 1e-9  # relative above 1; the gate's integers leave about 1e-12 per release
_PLAN_POINTS: Final = 12  # of a fixed schedule, at which a loss distribution is computed


@dataclass(frozen=True, slots=True)
class Fault:
    """A number in the ledger that is not what its releases cost."""

    position: int
    why: str


def close(said: float, computed: float) -> bool:
    """Whether two epsilons are the same number, rounding aside."""
    if not math.isfinite(computed):
        return said == computed
    return abs(said - computed) <= TOLERANCE * max(1.0, computed)


def figures(history: History) -> Figures:
    """What accountants say of everything that was charged.

    Raises:
        InvalidRequestError: dp-accounting is not installed.
    """
    delta, releases = history.in_force.target_delta, history.releases
    counts, total = histogram(releases), _total(releases)
    deltas = profile_deltas(delta)
    if counts is None:
        return Figures(rdp=math.inf, pld=math.inf, gdp=None, profile=tuple((d, math.inf, math.inf) for d in deltas))
    by_loss = {p.delta: p.epsilon for p in accounting.privacy_profile(counts, deltas=deltas)}
    return Figures(
        rdp=renyi.epsilon(total, delta),
        pld=by_loss[delta],
        gdp=accounting.gdp_estimate(counts, delta) if len(counts) == 1 else None,
        profile=tuple((d, renyi.epsilon(total, d), by_loss[d]) for d in deltas),
    )


def first_fault(history: History) -> Fault | None:
    """The first charge whose ``epsilon_after`` is not what the releases up to it cost; ``None`` if all are right."""
    planned = [c for c in history.charges if c.accountant == "prv"]
    delta = history.in_force.target_delta
    left = _after_plan(history, delta) if planned else delta
    total, before = renyi.zero(), 0.0
    for count, charge in enumerate(history.charges):
        total = renyi.add(total, _cost(charge.release))
        said, by_plan = charge.epsilon_after, charge.accountant == "prv"
        gate = renyi.epsilon(total, delta if by_plan else left)
        if by_plan and (planned[count : count + 1] != [charge] or not _of_plan(history, charge, count)):
            return Fault(charge.position, "it claims a schedule that it does not follow")
        if by_plan and said < before:
            return Fault(charge.position, f"epsilon falls to {said}; it was {before}")
        if not close(said, gate) and not (by_plan and said < gate):
            return Fault(charge.position, f"it says epsilon {said}; the releases up to it cost {gate}")
        before = said
    return _plan_fault(planned, delta)


def understated(history: History) -> float | None:
    """Epsilon by the loss distribution of all releases where the ledger claims less than that, else ``None``.

    That estimate is pessimistic, by its grid; where the gate's own, proven value is smaller, an optimistic one
    decides.
    """
    counts, delta, said = histogram(history.releases), history.in_force.target_delta, history.epsilon_spent
    if counts is None:
        return math.inf if math.isfinite(said) else None
    upper = accounting.loss_distribution(counts)
    if upper is None or said >= upper.get_epsilon(delta):
        return None
    if any(c.accountant == "prv" for c in history.charges):
        return float(upper.get_epsilon(delta))
    lower = accounting.loss_distribution(counts, pessimistic=False)
    bound = math.inf if lower is None else float(lower.get_epsilon(delta))
    return bound if said < bound else None


def _plan_fault(planned: Sequence[Charge], delta: float) -> Fault | None:
    """The planned charges against their loss distribution, at a few of them: it grows with every release."""
    for index in thinned(len(planned), _PLAN_POINTS):
        charge, times = planned[index], index + 1
        key = charge.release.noise_multiplier, charge.release.sample_rate
        bound = accounting.pld_epsilon({key: times}, delta)
        if charge.epsilon_after < bound:
            return Fault(
                charge.position,
                f"it says epsilon {charge.epsilon_after}; {times} such releases cost at least {bound}",
            )
    return None


def _of_plan(history: History, charge: Charge, count: int) -> bool:
    """Whether a charge that ``count`` others come before is of the schedule."""
    plan = history.plan
    return plan is not None and (plan.run_id, plan.release) == (charge.run_id, charge.release) and count < plan.steps


def _after_plan(history: History, delta: float) -> float:
    """The share of delta that a begun schedule leaves: it keeps what its whole could use at its target."""
    plan = history.plan
    if plan is None or not math.isfinite(plan.target_epsilon):
        return delta
    counts = histogram([plan.release]) or {}
    used = accounting.privacy_profile(
        {key: times * plan.steps for key, times in counts.items()}, epsilons=[plan.target_epsilon]
    )
    return max(0.0, delta - used[0].delta)


def _cost(release: Release) -> renyi.Costs:
    if release.noise_multiplier == 0.0:
        return np.full(len(renyi.ORDERS), renyi.INFINITE)
    return renyi.repeated(renyi.step_costs(release.noise_multiplier, release.sample_rate), release.times)


def _total(releases: Sequence[Release]) -> renyi.Costs:
    total = renyi.zero()
    for release in releases:
        total = renyi.add(total, _cost(release))
    return total

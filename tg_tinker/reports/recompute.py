"""Epsilon of a history, computed again: what each charge cost by the gate, and what others say of all of them.

A charge by the gate has one right answer, to float64 rounding. A charge by PRV has none here, since that accountant
comes with the server; it must lie between the privacy loss distribution of the same releases and the gate's value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from tg_tinker.errors import InvalidRequestError
from tg_tinker.ledger.history import Charge, History
from tg_tinker.ledger.releases import Release, histogram
from tg_tinker.privacy import accounting, renyi
from tg_tinker.reports.statement import Figures, profile_deltas, thinned

TOLERANCE: Final = 1e-9  # relative above 1; the gate's integers leave about 1e-12 per release
MOST_KINDS: Final = (
    1000  # different (noise multiplier, rate) of one report: a hundredth of a second each, at worst 0.06
)
MOST_BY_LOSS: Final = 16  # of those, whose loss distributions are composed: up to three seconds together
_PLAN_POINTS: Final = 24  # of a fixed schedule of sampled releases, at which a loss distribution is computed


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


def refuse_too_many_kinds(history: History) -> None:
    """Refuse what would take minutes to price.

    Raises:
        InvalidRequestError: the dataset was released at more than ``MOST_KINDS`` different noise levels or rates.
    """
    kinds = len({(r.noise_multiplier, r.sample_rate) for r in history.releases})
    if kinds > MOST_KINDS:
        raise InvalidRequestError(
            f"{kinds:,} different noise multipliers or sampling rates were released, and a report covers at most "
            f"{MOST_KINDS:,}; a new dataset begins a ledger of its own",
            field="dataset_id",
            constraint=f"at most {MOST_KINDS} kinds of releases",
        )


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
    composed = loss_distribution(counts)
    by_loss = {d: math.inf if composed is None else float(composed.get_epsilon(d)) for d in deltas}
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
    decides. ``None`` also where it has no finite value, at a delta of about 1e-15, and where it is not computed:
    then :func:`first_fault` alone decides.
    """
    counts, delta, said = histogram(history.releases), history.in_force.target_delta, history.epsilon_spent
    if counts is None:
        return math.inf if math.isfinite(said) else None
    upper = loss_distribution(counts)
    bound = math.inf if upper is None else float(upper.get_epsilon(delta))
    if said >= bound or math.isinf(bound):
        return None
    if any(c.accountant == "prv" for c in history.charges):
        return bound
    lower = loss_distribution(counts, pessimistic=False)
    bound = math.inf if lower is None else float(lower.get_epsilon(delta))
    return bound if said < bound else None


def last_fault(history: History) -> Fault | None:
    """Whether the last charge of all is below what its releases cost; one by the gate is left to :func:`first_fault`.

    That function looks at some points of a schedule only, between which epsilon cannot fall. Whoever relies on
    another point asks here.
    """
    charges = history.charges
    if not charges or charges[-1].accountant != "prv":
        return None
    return _below_loss(charges[-1], len(charges), history.in_force.target_delta)


def _plan_fault(planned: Sequence[Charge], delta: float) -> Fault | None:
    """The planned charges against their loss distribution, which grows with every release.

    Every one of them where nothing is sampled, since that distribution is known in closed form; else a few.
    """
    exact = bool(planned) and not planned[0].release.amplified
    for index in range(len(planned)) if exact else thinned(len(planned), _PLAN_POINTS):
        fault = _below_loss(planned[index], index + 1, delta)
        if fault is not None:
            return fault
    return None


def _below_loss(charge: Charge, times: int, delta: float) -> Fault | None:
    """Whether a charge claims less than ``times`` of its releases cost at least."""
    said, sigma = charge.epsilon_after, charge.release.noise_multiplier
    if math.isinf(said):
        return None
    counts = {(sigma, charge.release.sample_rate): times}
    if not charge.release.amplified:
        exact = gaussian_delta(math.sqrt(times) / sigma, said)
        if exact <= delta * (1.0 + TOLERANCE):
            return None
        return Fault(charge.position, f"at the epsilon {said} that it says, {times} such releases have delta {exact}")
    upper = loss_distribution(counts)
    bound = math.inf if upper is None else float(upper.get_epsilon(delta))
    if math.isinf(
        bound
    ):  # at so small a delta, or for so many releases, PRV gives up too, and its price is the gate's
        gate = accounting.gate_epsilon(counts, delta)
        bound = said if close(said, gate) else gate
    if said >= bound:
        return None
    return Fault(charge.position, f"it says epsilon {said}; {times} such releases cost at least {bound}")


def gaussian_delta(mu: float, epsilon: float) -> float:
    """The smallest delta of a Gaussian release at ``epsilon``, exact (Balle and Wang 2018, Theorem 8).

    ``mu`` is the sensitivity over the noise; for k releases, that of one times the root of k.
    """
    if mu <= 0.0:
        return 0.0
    reached, missed = (epsilon / mu - mu / 2) / math.sqrt(2), (epsilon / mu + mu / 2) / math.sqrt(2)
    tail = math.erfc(missed) if missed < 25 else 0.0
    # Beyond float64 its logarithm, from above by 1 part in 1,250: the result is then that much too small.
    log_tail = math.log(tail) if tail else -missed * missed - math.log(missed * math.sqrt(math.pi))
    return max(0.0, (math.erfc(reached) - math.exp(epsilon + log_tail)) / 2)


def loss_distribution(counts: accounting.Histogram, *, pessimistic: bool = True) -> Any | None:
    """The loss distribution of a history, or ``None`` where it cannot be computed in seconds."""
    if len(counts) > MOST_BY_LOSS:
        return None
    return accounting.loss_distribution(counts, pessimistic=pessimistic)


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

"""What a job costs at one site: the noise that keeps it within every limit, and what its charges add up to.

Pure: a ledger's history and terms in, numbers out. All arithmetic is the gate's (`tg_tinker.privacy`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from tg_tinker.errors import FederationRefusedError, InvalidRequestError
from tg_tinker.federated.job import Job
from tg_tinker.ledger.history import History, Terms
from tg_tinker.ledger.releases import Release, histogram
from tg_tinker.privacy import plan
from tg_tinker.privacy.accounting import gate_epsilon
from tg_tinker.privacy.solving import smallest

Histogram = Mapping[tuple[float, float], int]
_GRID = 10_000  # noise multipliers are multiples of 1e-4, as in plans
_WHOLE = 1e-6
_LARGEST = 1_000  # a noise multiplier beyond this leaves nothing to learn


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """The site's dataset as its own server describes it.

    Attributes:
        public_units: that the site says in public that it has at least. Every answer depends on this number alone.
        terms: the budget in force.
        spent: releases of every run so far, as if drawn from so many (`as_public`); ``None`` after an un-noised one.
        promised: releases that other jobs were promised and did not make yet, likewise.
    """

    public_units: int
    terms: Terms
    spent: Histogram | None
    promised: Histogram


def solve_noise(job: Job, holding: Holding, *, floor: float, max_epsilon: float) -> float:
    """The least noise multiplier with which the whole job keeps its target, the policy and the dataset's budget.

    Args:
        floor: the policy's least noise multiplier.
        max_epsilon: the policy's largest epsilon for a job.

    Raises:
        FederationRefusedError: reason "policy": no noise is enough, or the job does not fit the data. The message
            tells neither sizes nor what was spent: the coordinator reads it.
    """
    records = job.records
    assert records is not None
    if records.unit != holding.terms.unit:
        raise _refused(
            f"this site's data is registered with {holding.terms.unit!r} as the privacy unit, and the job protects "
            f"each {records.unit!r}"
        )
    if holding.spent is None:
        raise _refused("this site's data was released without noise before, so its epsilon is infinite")
    if 2 * records.target_delta * holding.public_units >= 1:
        # There may be almost twice as many units as the public number says: delta must be below one over that.
        raise _unfit()
    try:
        alone = plan(
            epsilon=min(records.target_epsilon, max_epsilon),
            delta=records.target_delta,
            steps=job.total_steps,
            batch_size=job.batch_size,
            dataset_size=holding.public_units,
        )
    except InvalidRequestError as e:
        raise _unfit() from e
    before = _added(holding.spent, holding.promised)
    rate = job.batch_size / holding.public_units

    def fits(sigma: int) -> bool:
        after = _added(before, {(sigma / _GRID, rate): job.total_steps})
        return gate_epsilon(after, holding.terms.target_delta) <= holding.terms.target_epsilon

    least = max(math.ceil(round(floor * _GRID, 6)), round(alone.noise_multiplier * _GRID), 1)
    limited = math.isfinite(holding.terms.target_epsilon)
    found = smallest(fits, least=least, most=_LARGEST * _GRID) if limited else least
    if found is None or found > _LARGEST * _GRID:
        raise _unfit()
    return found / _GRID


def check_unprotected(job: Job, holding: Holding) -> None:
    """Refuse a job without privacy of records where the data was registered with a budget, which it would break.

    Raises:
        FederationRefusedError: reason "policy".
    """
    if math.isfinite(holding.terms.target_epsilon):
        raise _refused(
            "the job trains without privacy of records, and this site's data was registered with a budget; only data "
            "registered without a target can take part"
        )
    if job.batch_size > holding.public_units:
        raise _unfit()


def charges_of(history: History, runs: Collection[str]) -> list[Release]:
    """What these runs were charged for, settled or not."""
    return [charge.release for charge in history.charges if charge.run_id in runs]


def remaining(noise_multiplier: float, job: Job, public_units: int, charged: int) -> Histogram:
    """The releases that a job was promised and did not make, as if drawn from the public number of units."""
    left = max(0, job.total_steps - charged)
    return {(noise_multiplier, min(1.0, job.batch_size / public_units)): left} if left else {}


def as_public(counts: Histogram | None, units: int, public_units: int) -> Histogram | None:
    """Releases from ``units`` units as if from the public number of them, which is not more: they cost no less."""
    if counts is None:
        return None
    found: Counter[tuple[float, float]] = Counter()
    for (sigma, rate), times in counts.items():
        batch = rate * units  # a whole number, but for the division it came from
        batch = round(batch) if abs(batch - round(batch)) < _WHOLE else batch
        found[sigma, min(1.0, batch / public_units)] += times
    return found


def epsilon_of(releases: Iterable[Release], delta: float) -> float:
    """Epsilon of releases by the gate; inf after an un-noised one."""
    return epsilon_of_counts(histogram(releases), delta)


def epsilon_of_counts(counts: Histogram | None, delta: float) -> float:
    """The same of counted releases."""
    return math.inf if counts is None else gate_epsilon(counts, delta)


def merged(parts: Iterable[Histogram]) -> Histogram:
    """Several histories as one."""
    total: Counter[tuple[float, float]] = Counter()
    for part in parts:
        total.update(part)
    return total


def _added(first: Histogram, second: Histogram) -> Histogram:
    return merged([first, second])


def _unfit() -> FederationRefusedError:
    return _refused(
        "this site's data or what is left of its budget cannot carry the job: its operator can say whether a smaller "
        "batch, fewer steps, a smaller delta or another target would do"
    )


def _refused(message: str) -> FederationRefusedError:
    return FederationRefusedError(message, reason="policy")

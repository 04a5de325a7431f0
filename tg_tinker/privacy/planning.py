"""Any one unknown among noise, epsilon, steps, batch and dataset size from the rest.

Every solved value is rounded to the safe side and tested there: put back, it keeps the target under the gate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

from tg_tinker.errors import InvalidRequestError
from tg_tinker.privacy import renyi
from tg_tinker.privacy.accounting import gate_epsilon, prv_epsilon
from tg_tinker.privacy.checks import (
    LARGEST_DATASET,
    MANY_STEPS,
    check_choices,
    check_delta,
    check_ranges,
    delta_or_default,
    the_unknown,
)
from tg_tinker.privacy.plans import Plan, Sampling, Unknown, passes
from tg_tinker.privacy.solving import largest, smallest

_SIGMA_GRID = 10_000  # noise multipliers are multiples of 1e-4
_LARGEST_SIGMA = 1_000_000


def plan(
    *,
    epsilon: float | None = None,
    delta: float | None = None,
    noise_multiplier: float | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    dataset_size: int | None = None,
    accountant: Literal["rdp", "prv"] = "rdp",
    sampling: Sampling = "poisson",
    participations: int | None = None,
) -> Plan:
    """Solve for the one thing that is not given.

    >>> plan(epsilon=8, delta=2e-5, steps=90, batch_size=128, dataset_size=45_593).noise_multiplier
    0.4048

    Args:
        epsilon: the target.
        delta: below 1 / ``dataset_size``; default half of that, needed where the dataset size is unknown.
        noise_multiplier: noise standard deviation over ``max_grad_norm``; solved to 1e-4, rounded up.
        steps: noised steps; solved for the most that fit.
        batch_size: expected privacy units in a step; solved for the largest that fits.
        dataset_size: privacy units; solved for the fewest that do.
        accountant: "rdp", the gate, or "prv", which is tighter and holds for a schedule fixed in advance.
        sampling: "poisson" amplifies by batch_size / dataset_size. Under "none" a step costs a whole release and the
            sizes do not matter. Under "max_participation" a run costs as many releases as its busiest unit's steps.
        participations: that number; without it, batches are taken to go through the data in order, which makes it
            ceil(steps * batch_size / dataset_size).

    Raises:
        InvalidRequestError: not exactly one unknown, a value out of range, a target that nothing reaches, or a
            delta that the server would refuse for that many units; it says what to change.
    """
    given: dict[str, Any] = {
        "noise_multiplier": noise_multiplier,
        "epsilon": epsilon,
        "steps": steps,
        "batch_size": batch_size,
        "dataset_size": dataset_size,
    }
    check_choices(accountant, sampling, participations)
    if sampling == "max_participation" and participations is not None and steps is None:
        given["steps"] = participations  # a unit cannot take part that often in fewer
    unknown = the_unknown(given, sampling, participations)
    check_ranges(**given)
    delta = delta_or_default(delta, dataset_size)
    check_delta(delta, dataset_size)

    def at(value: int | None = None) -> float:
        """Epsilon with the unknown set to ``value``; a noise multiplier counts in units of 1e-4."""
        values = {**given, unknown: value}
        sigma = noise_multiplier if unknown != "noise_multiplier" or value is None else value / _SIGMA_GRID
        assert sigma is not None
        rate = values["batch_size"] / values["dataset_size"] if sampling == "poisson" else 1.0
        releases = _releases(values, sampling, participations)
        by_gate = gate_epsilon({(sigma, rate): releases}, delta)
        return by_gate if accountant == "rdp" else min(by_gate, prv_epsilon(sigma, rate, releases, delta))

    if unknown == "epsilon":
        given["epsilon"] = at()
        if given["epsilon"] == math.inf:
            raise InvalidRequestError(
                "so little noise promises nothing after so many steps: epsilon is infinite; take more of it",
                field="noise_multiplier",
                constraint="epsilon finite",
            )
    else:
        assert epsilon is not None
        found = _solve(unknown, lambda n: at(n) <= epsilon, given)
        if not found:
            raise _unreachable(unknown, epsilon, delta, accountant)
        given[unknown] = found / _SIGMA_GRID if unknown == "noise_multiplier" else found
        check_delta(delta, given["dataset_size"], solved=True)
        given["epsilon"] = at(found)
    return Plan(
        **given,
        delta=delta,
        sampling=sampling,
        participations=_releases(given, sampling, participations) if sampling == "max_participation" else None,
        accountant=accountant,
        solved=unknown,
        target_epsilon=epsilon,
    )


def _releases(values: dict[str, Any], sampling: Sampling, participations: int | None) -> int:
    if sampling != "max_participation":
        return int(values["steps"])
    if participations is not None:
        return min(participations, int(values["steps"]))
    return passes(values["steps"], values["batch_size"], values["dataset_size"])


def _solve(unknown: Unknown, fits: Callable[[int], bool], given: dict[str, Any]) -> int | None:
    """The unknown as a whole number that fits, on the safe side of the next one; 0 or ``None`` if there is none."""
    match unknown:
        case "noise_multiplier":
            return smallest(fits, least=1, most=_LARGEST_SIGMA * _SIGMA_GRID)
        case "steps":
            return largest(fits, most=MANY_STEPS)
        case "batch_size":
            return largest(fits, most=given["dataset_size"])
        case _:
            return smallest(fits, least=given["batch_size"], most=LARGEST_DATASET)


def _unreachable(unknown: Unknown, epsilon: float, delta: float, accountant: str) -> InvalidRequestError:
    least = renyi.epsilon(renyi.zero() + 1, delta)
    if accountant == "rdp" and epsilon < least:
        return InvalidRequestError(
            f"at delta {delta:g} the gate promises no epsilon below {least:.4g}, however much noise there is; raise "
            "epsilon or delta",
            field="epsilon",
            constraint=f">= {least:.6g} at this delta",
        )
    advice = {
        "noise_multiplier": "no noise multiplier below a million will do: take fewer steps or a smaller batch",
        "steps": "not one step fits: take more noise, a larger dataset or a larger epsilon",
        "batch_size": "not even a batch of one fits: take more noise, fewer steps, more data or a larger epsilon",
        "dataset_size": "no dataset is large enough: take more noise, fewer steps, a smaller batch",
    }[unknown]
    return InvalidRequestError(
        f"epsilon {epsilon:g} at delta {delta:g} is out of reach: {advice}",
        field=unknown,
        constraint=f"epsilon <= {epsilon:g}",
    )

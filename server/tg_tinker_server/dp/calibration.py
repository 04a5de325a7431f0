"""Planning: a noise multiplier for a target epsilon, and how many steps a budget allows."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tg_tinker.errors import InvalidRequestError
from tg_tinker_server.dp.accounting import Costs, add, cost, epsilon, repeated
from tg_tinker_server.dp.events import Event, Gaussian, SampledGaussian

_LARGEST_SIGMA = 1e6
_PRECISION = 1e-4  # relative
MANY_STEPS = 10_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Epsilon now and later, at delta. ``steps_remaining`` is -1 without a finite target."""

    epsilon_now: float
    epsilon_after: float
    steps_remaining: int
    delta: float


def step_event(noise_multiplier: float, sample_rate: float) -> Event:
    """One step: amplified only below rate 1."""
    if sample_rate >= 1.0:
        return Gaussian(noise_multiplier=noise_multiplier)
    return SampledGaussian(noise_multiplier=noise_multiplier, sample_rate=sample_rate, vouched_by="client")


def epsilon_for(*, noise_multiplier: float, target_delta: float, sample_rate: float, steps: int) -> float:
    """Epsilon of ``steps`` equal steps on a dataset nobody spent from, by the accountant of the gate."""
    return epsilon(repeated(cost(step_event(noise_multiplier, sample_rate)), steps), target_delta)


def noise_multiplier_for(*, target_epsilon: float, target_delta: float, sample_rate: float, steps: int) -> float:
    """The smallest noise multiplier (to 1e-4, rounded up) for which ``steps`` steps stay within the target.

    Raises:
        InvalidRequestError: no noise multiplier below 1e6 does.
    """

    def fits(sigma: float) -> bool:
        spent = epsilon_for(noise_multiplier=sigma, target_delta=target_delta, sample_rate=sample_rate, steps=steps)
        return spent <= target_epsilon

    low, high = 0.0, 1.0
    while not fits(high):
        low, high = high, 2.0 * high
        if high > _LARGEST_SIGMA:
            raise InvalidRequestError(
                f"epsilon {target_epsilon:g} at delta {target_delta:g} cannot be kept over {steps} steps at sampling "
                f"rate {sample_rate:g}; take fewer steps, a smaller batch, a larger dataset, or a larger epsilon",
                field="dp_config.target_epsilon",
                constraint="reachable with noise_multiplier below 1e6",
            )
    while high - low > _PRECISION * high:
        middle = (low + high) / 2.0
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def steps_remaining(total: Costs, event: Event, *, target_epsilon: float, delta: float) -> int:
    """How many more such events fit under the target; at most ``MANY_STEPS``."""
    one = cost(event)
    if not one.any():
        return MANY_STEPS

    def fits(n: int) -> bool:
        return epsilon(add(total, repeated(one, n)), delta) <= target_epsilon

    low, high = 0, 1
    while high < MANY_STEPS and fits(high):
        low, high = high, min(2 * high, MANY_STEPS)
    if fits(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def forecast(total: Costs, event: Event, *, steps: int, target_epsilon: float | None, delta: float) -> Forecast:
    """Epsilon now, after ``steps`` more events, and how many the target allows."""
    finite = target_epsilon is not None and math.isfinite(target_epsilon)
    return Forecast(
        epsilon_now=epsilon(total, delta),
        epsilon_after=epsilon(add(total, repeated(cost(event), steps)), delta),
        steps_remaining=steps_remaining(total, event, target_epsilon=target_epsilon, delta=delta)
        if finite and target_epsilon is not None
        else -1,
        delta=delta,
    )

"""Plans agree with the gate that will judge them."""

from __future__ import annotations

import pytest

from tg_tinker.errors import InvalidRequestError
from tg_tinker_server.dp.accounting import add, cost, epsilon, repeated, zero
from tg_tinker_server.dp.calibration import epsilon_for, forecast, noise_multiplier_for, step_event, steps_remaining
from tg_tinker_server.dp.events import Gaussian


@pytest.mark.parametrize(("rate", "steps"), [(256 / 20000, 60), (1.0, 1), (0.001, 10_000)])
@pytest.mark.parametrize("target", [0.5, 3.0, 8.0])
def test_the_solved_noise_keeps_the_target_and_a_little_less_does_not(rate: float, steps: int, target: float) -> None:
    sigma = noise_multiplier_for(target_epsilon=target, target_delta=1e-5, sample_rate=rate, steps=steps)
    kept = epsilon_for(noise_multiplier=sigma, target_delta=1e-5, sample_rate=rate, steps=steps)
    broken = epsilon_for(noise_multiplier=sigma * 0.999, target_delta=1e-5, sample_rate=rate, steps=steps)
    assert kept <= target < broken


def test_an_impossible_target_is_refused_with_advice() -> None:
    with pytest.raises(InvalidRequestError, match="fewer steps"):
        noise_multiplier_for(target_epsilon=1e-3, target_delta=1e-5, sample_rate=1.0, steps=10**6)


def test_a_forecast_of_n_steps_is_what_n_steps_cost() -> None:
    event, delta = step_event(0.8, 0.02), 1e-5
    start = cost(Gaussian(noise_multiplier=3.0))
    planned = forecast(start, event, steps=37, target_epsilon=8.0, delta=delta)
    total = start
    for _ in range(37):
        total = add(total, cost(event))
    assert planned.epsilon_now == epsilon(start, delta)
    assert planned.epsilon_after == pytest.approx(epsilon(total, delta), abs=1e-9)


def test_the_steps_that_remain_fit_and_one_more_does_not() -> None:
    event, delta, target = step_event(0.8, 0.02), 1e-5, 8.0
    n = steps_remaining(zero(), event, target_epsilon=target, delta=delta)
    assert epsilon(repeated(cost(event), n), delta) <= target < epsilon(repeated(cost(event), n + 1), delta)


def test_without_a_target_no_number_of_steps_is_claimed() -> None:
    assert forecast(zero(), step_event(1.0, 1.0), steps=1, target_epsilon=None, delta=1e-5).steps_remaining == -1

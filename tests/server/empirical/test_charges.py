"""What runs cost at least is below what they cost, and near it."""

from __future__ import annotations

import math

import pytest

from tests.golden.epsilon_grid import gaussian_epsilon
from tg_tinker_server.empirical.charges import least_epsilon
from tg_tinker_server.empirical.draws import NOISE_MULTIPLIER, RATE


@pytest.mark.parametrize(("sigma", "times"), [(2.0, 6), (1.1, 4), (0.7, 1)])
def test_the_least_that_a_gaussian_costs_is_just_below_its_exact_epsilon(sigma: float, times: int) -> None:
    exact = gaussian_epsilon(sigma / math.sqrt(times), 1e-6)
    assert 0.99 * exact < least_epsilon({(sigma, 1.0): times}, 1e-6) < exact


def test_the_least_that_drawn_batches_cost_is_just_below_the_loss_distribution() -> None:
    from dp_accounting.pld import privacy_loss_distribution

    whole = privacy_loss_distribution.from_gaussian_mechanism(NOISE_MULTIPLIER, sampling_prob=RATE)
    above = whole.self_compose(32).get_epsilon_for_delta(1e-6)
    assert 0.99 * above < least_epsilon({(NOISE_MULTIPLIER, RATE): 32}, 1e-6) < above


def test_no_noise_has_no_least_epsilon_that_is_finite() -> None:
    assert least_epsilon({(1e-4, 1.0): 10}, 1e-6) == math.inf

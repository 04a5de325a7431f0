"""Epsilon, each time with a second answer from somebody else's accountant."""

from __future__ import annotations

import math

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import RDPAccountant
from scipy.special import logsumexp

from tg_tinker_server.dp.accounting import (
    INFINITE,
    ORDERS,
    UNITS,
    add,
    cost,
    epsilon,
    gdp_estimate,
    histogram,
    pld_delta,
    pld_epsilon,
    prv_epsilon,
    repeated,
    zero,
)
from tg_tinker_server.dp.events import Event, Gaussian, ParticipationGaussian, SampledGaussian, Unnoised


def sampled(sigma: float, rate: float) -> SampledGaussian:
    return SampledGaussian(noise_multiplier=sigma, sample_rate=rate, vouched_by="client")


def opacus_rdp(sigma: float, rate: float, steps: int, delta: float) -> float:
    accountant = RDPAccountant()
    accountant.history = [(sigma, rate, steps)]
    return float(accountant.get_epsilon(delta))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rate", [1e-9, 1e-4, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("sigma", [0.3, 0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("steps", [1, 100, 100_000])
def test_epsilon_equals_opacus_rdp_and_is_never_below_it(rate: float, sigma: float, steps: int) -> None:
    ours = epsilon(repeated(cost(sampled(sigma, rate)), steps), 1e-5)
    theirs = opacus_rdp(sigma, rate, steps, 1e-5)
    assert theirs - 1e-12 * abs(theirs) <= ours <= theirs * (1 + 1e-6) + 1e-6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("sigma", "rate", "steps"), [(1.0, 0.01, 1000), (0.6, 0.02, 60), (2.0, 1.0, 10), (1.1, 256 / 60000, 5000)]
)
def test_epsilon_is_never_below_the_privacy_loss_distribution(sigma: float, rate: float, steps: int) -> None:
    accountant = PLDAccountant()
    gaussian = dp_event.GaussianDpEvent(sigma)
    event = gaussian if rate == 1 else dp_event.PoissonSampledDpEvent(rate, gaussian)
    accountant.compose(dp_event.SelfComposedDpEvent(event, steps))
    reference = accountant.get_epsilon(1e-5)
    assert epsilon(repeated(cost(sampled(sigma, rate)), steps), 1e-5) >= reference
    assert prv_epsilon(sigma, rate, steps, 1e-5) >= reference - 1e-3
    assert pld_epsilon([sampled(sigma, rate)] * steps, 1e-5) == pytest.approx(reference, rel=2e-2)


@pytest.mark.filterwarnings("ignore")
def test_the_figures_of_the_design_hold() -> None:
    event = sampled(1.0, 0.01)
    assert epsilon(repeated(cost(event), 1000), 1e-5) == pytest.approx(2.10, abs=0.005)
    assert prv_epsilon(1.0, 0.01, 1000, 1e-5) == pytest.approx(1.84, abs=0.01)
    assert pld_epsilon([event] * 1000, 1e-5) == pytest.approx(1.83, abs=0.005)
    estimate = gdp_estimate([event] * 1000, 1e-5)
    assert estimate == pytest.approx(1.62, abs=0.005)  # below the truth: an estimate, never a bound


def test_one_gaussian_costs_what_its_formula_says() -> None:
    sigma, delta = 2.0, 1e-5
    orders = np.array([1 + x / 10 for x in range(1, 100)] + list(range(12, 64)))
    by_hand = orders / (2 * sigma**2) + np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)
    assert epsilon(cost(Gaussian(noise_multiplier=sigma)), delta) == pytest.approx(by_hand.min(), rel=1e-9)


events = st.one_of(
    st.builds(Gaussian, noise_multiplier=st.sampled_from([0.5, 1.0, 3.0])),
    st.builds(sampled, st.sampled_from([0.6, 1.0, 2.0]), st.sampled_from([1e-6, 0.01, 0.5])),
    st.builds(ParticipationGaussian, noise_multiplier=st.just(1.0), releases=st.integers(0, 3)),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(events, max_size=12), events)
def test_a_history_never_gets_cheaper_and_order_does_not_matter(history: list[Event], more: Event) -> None:
    def total(items: list[Event]) -> np.ndarray:
        result = zero()
        for item in items:
            result = add(result, cost(item))
        return result

    assert (total(history) == total(history[::-1])).all()
    assert epsilon(total([*history, more]), 1e-5) >= epsilon(total(history), 1e-5)


def test_repeating_is_the_same_as_adding_one_by_one() -> None:
    one, total = cost(sampled(0.7, 0.02)), zero()
    for _ in range(500):
        total = add(total, one)
    assert (total == repeated(one, 500)).all()


def test_an_unnoised_release_is_infinite_for_ever() -> None:
    total = add(cost(Unnoised()), cost(sampled(100.0, 1e-6)))
    assert epsilon(total, 1e-5) == math.inf
    assert epsilon(add(total, total), 1e-5) == math.inf
    assert (repeated(cost(Unnoised()), 10**9) == INFINITE).all()
    assert histogram([Gaussian(noise_multiplier=1.0), Unnoised()]) is None
    assert pld_epsilon([Unnoised()], 1e-5) == math.inf


def test_no_release_costs_nothing_and_the_smallest_rate_costs_something() -> None:
    assert epsilon(zero(), 1e-5) == 0.0
    assert (cost(sampled(20.0, 1e-12)) > 0).all()
    assert not cost(ParticipationGaussian(noise_multiplier=1.0, releases=0)).any()


def renyi_by_integration(sigma: float, rate: float, order: float) -> float:
    """The divergence of the sampled Gaussian by quadrature, with the cancellation taken out by hand."""
    z = np.linspace(-12 * sigma, 12 * sigma + order, 200_001)
    shift = rate * np.expm1((2 * z - 1) / (2 * sigma**2))
    log_ratio = order * np.log1p(shift)
    log_density = -(z**2) / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi))
    if np.max(log_ratio + log_density) > 10:  # far above 1: no cancellation, but too large for a float
        return float(logsumexp(log_ratio + log_density) + math.log(z[1] - z[0])) / (order - 1)
    density = np.exp(log_density)
    small = np.minimum(log_ratio, 30.0)
    excess = np.where(
        log_ratio > 30.0,
        np.exp(np.minimum(log_ratio + log_density, 700.0)) - (1 + order * shift) * density,
        (np.expm1(small) - order * shift) * density,  # E[shift] is 0
    )
    return math.log1p(float(np.trapezoid(excess, z))) / (order - 1)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0, 50.0])
@pytest.mark.parametrize("rate", [1e-6, 1e-3, 0.05, 0.5, 0.999])
def test_no_cost_is_below_the_divergence_itself(sigma: float, rate: float) -> None:
    costs = cost(sampled(sigma, rate)) / UNITS
    for i in (0, 4, 9, 15, 40, 98, 99, 120, 150):
        truth = renyi_by_integration(sigma, rate, float(ORDERS[i]))
        assert costs[i] >= truth * (1 - 1e-9) - 1e-13
        assert costs[i] <= truth * (1 + 1e-5) + 2e-11


@pytest.mark.parametrize(
    ("sigma", "rate", "steps"),
    [(1e-9, 1.0, 1), (0.01, 0.5, 10), (0.05, 1.0, 1000), (0.3, 0.999, 10**6), (200.0, 1e-6, 10), (1.0, 0.01, 10**7)],
)
def test_extreme_plans_are_answered_and_never_with_too_little(sigma: float, rate: float, steps: int) -> None:
    event = sampled(sigma, rate)
    by_gate = epsilon(repeated(cost(event), steps), 1e-5)
    assert prv_epsilon(sigma, rate, steps, 1e-5) > 0
    assert 0 <= pld_delta(sigma, rate, steps, 4.0) <= 1
    assert histogram([event]) is not None
    assert gdp_estimate([event] * min(steps, 1000), 1e-5) is None or by_gate < math.inf
    assert by_gate > 0


def test_prv_gives_up_to_infinity_where_its_grid_would_not_fit() -> None:
    assert prv_epsilon(0.05, 1.0, 1000, 1e-5) == math.inf
    assert prv_epsilon(1.0, 0.01, 10**7, 1e-5) == math.inf
    assert prv_epsilon(1.0, 0.01, 0, 1e-5) == 0.0


def test_prv_says_nothing_where_rounding_would_decide() -> None:
    """At delta 1e-12 a thousand steps lose more to the Fourier transform than delta has; Opacus then says 7.41."""
    truth = 7.56  # dp_accounting's loss distribution, composed in tests/golden/epsilon_grid.py
    assert prv_epsilon(0.3, 1e-7, 1000, 1e-12) == math.inf > truth
    assert prv_epsilon(0.3, 1e-7, 200, 1e-12) == math.inf  # 0.7e-12 may be lost
    assert math.isfinite(prv_epsilon(0.3, 1e-7, 1000, 1e-8))
    assert prv_epsilon(1.0, 0.01, 1000, 1e-5) == pytest.approx(1.836, abs=5e-3)


def test_delta_and_epsilon_of_the_loss_distribution_undo_each_other() -> None:
    at = pld_epsilon([sampled(1.0, 0.01)] * 1000, 1e-5)
    assert pld_delta(1.0, 0.01, 1000, at) == pytest.approx(1e-5, rel=1e-3)
    assert pld_delta(1.0, 0.01, 1000, at + 1) < 1e-6


def test_no_delta_no_finite_epsilon() -> None:
    assert epsilon(cost(Gaussian(noise_multiplier=100.0)), 0.0) == math.inf
    assert epsilon(zero(), 0.0) == 0.0

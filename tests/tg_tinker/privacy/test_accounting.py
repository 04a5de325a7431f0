"""Epsilon of a history without a server: the server's own number, and accountants that share nothing with it."""

from __future__ import annotations

import math
import sys
import warnings

import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import GaussianAccountant

from tests.golden.epsilon_grid import gaussian_epsilon
from tg_tinker.errors import InvalidRequestError
from tg_tinker.privacy import accounting, gate_epsilon, gdp_estimate, pld_epsilon, privacy_profile
from tg_tinker.privacy.accounting import loss_distribution, prv_epsilon
from tg_tinker_server.dp import accounting as server
from tg_tinker_server.dp.events import Event, Gaussian, ParticipationGaussian, SampledGaussian

MIXED = {(1.0, 0.01): 300, (0.7, 0.004): 50, (3.0, 1.0): 2}


@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-12])
@pytest.mark.parametrize("steps", [1, 1000, 1_000_000])
@pytest.mark.parametrize("rate", [1e-9, 1e-3, 0.5, 1.0])
@pytest.mark.parametrize("sigma", [0.1, 1.0, 20.0])
def test_a_stranger_gets_the_gates_epsilon_to_the_last_digit(
    sigma: float, rate: float, steps: int, delta: float
) -> None:
    event = SampledGaussian(noise_multiplier=sigma, sample_rate=rate, vouched_by="server")
    charged = server.epsilon(server.repeated(server.cost(event), steps), delta)
    assert gate_epsilon({(sigma, rate): steps}, delta) == charged


events = st.one_of(
    st.builds(Gaussian, noise_multiplier=st.sampled_from([0.5, 1.0, 3.0])),
    st.builds(
        SampledGaussian,
        noise_multiplier=st.sampled_from([0.6, 1.0, 2.0]),
        sample_rate=st.sampled_from([1e-6, 0.01, 0.5]),
        vouched_by=st.just("client"),
    ),
    st.builds(ParticipationGaussian, noise_multiplier=st.just(1.0), releases=st.integers(0, 3)),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(events, max_size=20))
def test_a_mixed_history_is_added_up_as_the_server_does_step_by_step(history: list[Event]) -> None:
    total = server.zero()
    for event in history:
        total = server.add(total, server.cost(event))
    counts = server.histogram(history)
    assert counts is not None
    assert gate_epsilon(counts, 1e-5) == pytest.approx(server.epsilon(total, 1e-5), abs=1e-9)


@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-10])
@pytest.mark.parametrize(("sigma", "times"), [(1.0, 1), (2.0, 20), (0.2, 3), (20.0, 100)])
def test_without_sampling_the_loss_distribution_is_the_exact_gaussian(sigma: float, times: int, delta: float) -> None:
    exact = gaussian_epsilon(sigma / math.sqrt(times), delta)
    assert exact <= pld_epsilon({(sigma, 1.0): times}, delta) <= exact * (1 + 1e-4) + 1e-6


def test_a_mixed_history_by_loss_distributions_is_dp_accountings_own() -> None:
    theirs = PLDAccountant(value_discretization_interval=2e-4)
    for (sigma, rate), times in MIXED.items():
        gaussian = dp_event.GaussianDpEvent(sigma)
        event = gaussian if rate == 1 else dp_event.PoissonSampledDpEvent(rate, gaussian)
        theirs.compose(dp_event.SelfComposedDpEvent(event, times))
    for delta in (1e-4, 1e-6):
        assert pld_epsilon(MIXED, delta) == pytest.approx(theirs.get_epsilon(delta), rel=1e-3)
        assert pld_epsilon(MIXED, delta) < gate_epsilon(MIXED, delta)


def test_a_million_small_steps_are_not_lost_in_the_grid() -> None:
    """By the central limit theorem epsilon is that of one Gaussian; a grid of 1e-4 overstated it by half."""
    sigma, rate, steps = 20.0, 1e-4, 1_000_000
    mu = rate * math.sqrt(steps * math.expm1(sigma**-2))
    limit = gaussian_epsilon(1 / mu, 1e-5)
    assert limit < pld_epsilon({(sigma, rate): steps}, 1e-5) < 1.05 * limit


def test_a_profile_goes_from_delta_to_epsilon_and_back() -> None:
    deltas = (1e-3, 1e-5, 1e-7)
    there = privacy_profile(MIXED, deltas=deltas)
    assert [p.delta for p in there] == list(deltas)
    assert [p.epsilon for p in there] == sorted(p.epsilon for p in there)
    assert there[1].epsilon == pld_epsilon(MIXED, 1e-5)
    back = privacy_profile(MIXED, epsilons=[p.epsilon for p in there])
    assert [p.delta for p in back] == pytest.approx(deltas, rel=1e-6)


def test_optimistic_and_pessimistic_enclose_the_truth() -> None:
    exact = gaussian_epsilon(2.0, 1e-5)
    low = loss_distribution({(2.0, 1.0): 1}, pessimistic=False)
    assert low is not None
    assert exact * (1 - 1e-3) <= low.get_epsilon(1e-5) <= exact <= pld_epsilon({(2.0, 1.0): 1}, 1e-5)


@pytest.mark.parametrize(("sigma", "rate", "times"), [(1.0, 0.01, 1000), (4.0, 0.1, 2000), (10.0, 0.5, 3)])
def test_the_estimate_is_opacus_estimate(sigma: float, rate: float, times: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        theirs = GaussianAccountant()
    theirs.history = [(sigma, rate, times)]
    assert gdp_estimate({(sigma, rate): times}, 1e-5) == pytest.approx(theirs.get_epsilon(1e-5), rel=1e-6)


def test_the_estimate_says_nothing_rather_than_nonsense() -> None:
    assert gdp_estimate({(0.01, 0.5): 10}, 1e-5) is None
    assert gdp_estimate({(1e-200, 0.5): 10}, 1e-5) is None
    assert gdp_estimate({(0.5, 0.9): 100_000}, 1e-5) is None
    assert gdp_estimate({(20.0, 1e-9): 1}, 1e-5) == 0.0


def test_nothing_released_costs_nothing() -> None:
    for history in ({}, {(1.0, 0.5): 0}):
        assert gate_epsilon(history, 1e-5) == pld_epsilon(history, 1e-5) == gdp_estimate(history, 1e-5) == 0.0
        assert privacy_profile(history, epsilons=[0.0])[0].delta == 0.0
    assert prv_epsilon(1.0, 0.5, 0, 1e-5) == 0.0


def test_what_cannot_be_computed_is_infinite() -> None:
    history = {(0.05, 1.0): 1_000_000}
    assert loss_distribution(history) is None
    assert pld_epsilon(history, 1e-5) == math.inf
    assert privacy_profile(history, deltas=[1e-5])[0].epsilon == math.inf
    assert privacy_profile(history, epsilons=[10.0])[0].delta == 1.0
    assert pld_epsilon({(1.0, 1e-5): 10_000_000}, 1e-5) == math.inf


@pytest.mark.parametrize(
    ("history", "delta", "field"),
    [
        ({(0.0, 0.5): 1}, 1e-5, "noise_multiplier"),
        ({(math.nan, 0.5): 1}, 1e-5, "noise_multiplier"),
        ({(math.inf, 0.5): 1}, 1e-5, "noise_multiplier"),
        ({(1.0, 0.0): 1}, 1e-5, "sample_rate"),
        ({(1.0, 1.5): 1}, 1e-5, "sample_rate"),
        ({(1.0, 0.5): -1}, 1e-5, "steps"),
        ({(1.0, 0.5): 1}, 0.0, "delta"),
        ({(1.0, 0.5): 1}, 1.0, "delta"),
        ({(1.0, 0.5): 1}, math.nan, "delta"),
    ],
)
def test_an_impossible_history_is_refused_by_every_accountant(
    history: dict[tuple[float, float], int], delta: float, field: str
) -> None:
    for ask in (gate_epsilon, pld_epsilon, gdp_estimate):
        with pytest.raises(InvalidRequestError) as caught:
            ask(history, delta)
        assert caught.value.field == field


def test_a_profile_needs_one_question() -> None:
    with pytest.raises(InvalidRequestError):
        privacy_profile(MIXED)
    with pytest.raises(InvalidRequestError):
        privacy_profile(MIXED, deltas=[1e-5], epsilons=[1.0])
    with pytest.raises(InvalidRequestError):
        privacy_profile(MIXED, epsilons=[-1.0])


def test_without_the_packages_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    accounting._composed.cache_clear()
    for name in [m for m in sys.modules if m.split(".")[0] == "dp_accounting"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InvalidRequestError, match=r"pip install 'tg-tinker\[audit\]'"):
        pld_epsilon({(1.234, 0.5): 1}, 1e-5)
    monkeypatch.setattr(accounting, "_prv", lambda: None)
    with pytest.raises(InvalidRequestError, match=r"pip install 'tg-tinker\[server\]'"):
        prv_epsilon(1.0, 0.5, 1, 1e-5)
    assert [accounting.installed(n) for n in ("rdp", "prv", "pld", "gdp", "x")] == [True, False, False, True, False]
    assert gate_epsilon({(1.234, 0.5): 1}, 1e-5) > 0

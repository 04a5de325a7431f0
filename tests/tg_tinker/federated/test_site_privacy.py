"""Site-level privacy: what a row may hold, what its noise means, and which jobs are refused before they begin."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tg_tinker.federated.jobs import make_job
from tg_tinker.errors import FederationRefusedError
from tg_tinker.federated.job import AdaptiveBound, SitePrivacy
from tg_tinker.federated.site_privacy import SiteTerms, check_feasible, next_bound
from tg_tinker.privacy import pld_epsilon


def privacy(**settings):
    defaults = {"population": 1000, "sample_rate": 0.1, "noise_multiplier": 1.0, "target_epsilon": 1e4}
    return SitePrivacy(**{**defaults, "target_delta": 1e-4, **settings})


def adaptive(**settings):
    return privacy(adaptive=AdaptiveBound(**settings))


VECTORS = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8).map(
    lambda v: np.array(v, np.float32)
)


@given(VECTORS, st.floats(1e-6, 1e6), st.floats(0.6, 1e3), st.floats(0.1, 1.0))
def test_no_site_moves_the_joint_sum_by_more_than_one(update, bound, count_noise, z):
    terms = SiteTerms.of(adaptive(count_noise_multiplier=count_noise).model_copy(update={"noise_multiplier": z}))
    row = terms.encode(update, bound)
    assert row.dtype == np.float32
    assert np.linalg.norm(row.astype(np.float64)) <= 1 + 1e-6


@given(st.floats(0.1, 5.0), st.floats(3.0, 50.0))
def test_one_gaussian_pays_for_update_and_count_as_andrew_et_al_have_it(z, count_noise):
    terms = SiteTerms.of(privacy(noise_multiplier=z, adaptive=AdaptiveBound(count_noise_multiplier=count_noise)))
    # Noise z on each coordinate of the row is this much on the count, whose sensitivity is 1/2, and on the update.
    assert z / terms.count_scale == pytest.approx(count_noise)
    assert terms.update_noise_multiplier == pytest.approx((z**-2 - (2 * count_noise) ** -2) ** -0.5)


@given(VECTORS, st.floats(1e-3, 1e3))
def test_what_is_encoded_comes_back_clipped_with_its_place_below_or_above_the_bound(update, bound):
    terms = SiteTerms.of(adaptive())
    mean, share = terms.decode(terms.encode(update, bound).astype(np.float64), bound)
    norm = float(np.linalg.norm(update.astype(np.float64)))
    expected = update.astype(np.float64) * min(1.0, bound / norm if norm else 1.0)
    np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-6 * bound)
    assert share == pytest.approx(1.0 if norm <= bound else 0.0, abs=1e-5)


def test_a_fixed_bound_leaves_clipping_to_the_server():
    terms = SiteTerms.of(privacy())
    update = np.array([3e8, 4e8], np.float32)
    assert terms.encode(update, 1.0) is update
    assert terms.decode(np.array([1.0, 2.0]), 5.0)[1] is None
    assert (terms.update_scale, terms.update_noise_multiplier) == (1.0, 1.0)


def test_the_bound_walks_to_the_quantile_of_the_norms():
    sites = adaptive(quantile=0.7, rate=0.2)
    norms = np.random.default_rng(0).lognormal(mean=2.0, sigma=0.5, size=2000)
    bound = 1e-2
    for _ in range(400):
        bound = next_bound(sites, bound, float((norms <= bound).mean()))
    assert (norms <= bound).mean() == pytest.approx(0.7, abs=0.02)


def test_one_round_moves_the_bound_by_a_bounded_factor_whatever_the_noise():
    sites = adaptive(quantile=0.5, rate=0.2)
    for share in (-1e9, -1.0, 2.0, 1e9):
        assert math.exp(-0.2) <= next_bound(sites, 1.0, share) <= math.exp(0.2)
    assert next_bound(privacy(), 2.5, None) == 2.5
    bound = sites.clip
    for _ in range(10_000):
        bound = next_bound(sites, bound, 0.0)
    assert math.isfinite(bound)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"population": 10, "sample_rate": 0.33, "target_delta": 0.01}, "take 0.3"),
        ({"population": 100, "target_delta": 0.01}, "not below 1 / population"),
        ({"adaptive": AdaptiveBound(count_noise_multiplier=0.5)}, "needs more than 0.5"),
        ({"population": 10, "sample_rate": 0.01, "target_delta": 0.01}, "take 0.1"),
    ],
)
def test_terms_that_cannot_hold_together_are_refused(settings, said):
    with pytest.raises(FederationRefusedError, match=said) as e:
        SiteTerms.of(privacy(**settings))
    assert e.value.reason == "hopeless"


def feasible(size=50_000, rounds=10, sites=3, **settings):
    return check_feasible(make_job(sites=sites, rounds=rounds, sites_privacy=privacy(**settings)), {None: size})


def test_three_sites_are_hopeless_and_the_refusal_says_why_and_what_would_do():
    with pytest.raises(FederationRefusedError) as e:
        feasible(population=3, sample_rate=1.0, noise_multiplier=0.5)
    ratio = 0.5 * math.sqrt(50_000) / 3
    assert e.value.reason == "hopeless"
    assert e.value.details["noise_of_mean_over_clip"] == pytest.approx(ratio)
    assert e.value.details["noise_over_longest_way"] == pytest.approx(ratio / math.sqrt(10))
    assert f"{math.ceil(3 * ratio / math.sqrt(10) / 3)} sites a round" in e.value.message
    assert "inside each site" in e.value.message
    assert feasible(population=12, sample_rate=1.0, noise_multiplier=0.5)["noise_over_longest_way"] < 3


def test_a_population_of_many_devices_is_fine_at_the_epsilon_of_the_ledger():
    numbers = feasible(
        population=100_000,
        sample_rate=0.001,
        noise_multiplier=1.0,
        rounds=1000,
        target_delta=1e-6,
        target_epsilon=2.0,
    )
    assert numbers["epsilon"] == pytest.approx(0.87, abs=0.005)
    assert pld_epsilon({(1.0, 0.001): 1000}, 1e-6) <= numbers["epsilon"]
    assert numbers["expected_sites"] == 100


def test_rounds_that_cost_more_than_the_target_are_refused_with_the_noise_that_would_do():
    with pytest.raises(FederationRefusedError, match="it takes noise_multiplier") as e:
        feasible(target_epsilon=1.0, rounds=100)
    noise = float(e.value.message.split("noise_multiplier ")[2].split(",")[0])
    assert feasible(target_epsilon=1.0, rounds=100, noise_multiplier=noise)["epsilon"] <= 1.0
    with pytest.raises(FederationRefusedError):
        feasible(target_epsilon=1.0, rounds=100, noise_multiplier=noise - 0.01)


def test_a_population_smaller_than_the_roster_is_refused():
    with pytest.raises(FederationRefusedError, match="less than the 5 sites"):
        feasible(sites=5, population=4, sample_rate=1.0)


def test_alternating_rounds_share_the_rounds_among_the_factors():
    job = make_job(rounds=9, federated_lora="alternate", sites_privacy=privacy())
    numbers = check_feasible(job, {"a": 10_000, "b": 40_000})  # odd rounds freeze A: 5 of them, 4 even ones
    assert numbers["noise_over_longest_way"] == pytest.approx(max(1 / math.sqrt(5), 2 / math.sqrt(4)))


@pytest.mark.parametrize("count_noise", [0.2, 0.5])
def test_a_count_that_costs_more_than_the_round_is_refused(count_noise):
    with pytest.raises(FederationRefusedError, match="fixed bound"):
        SiteTerms.of(adaptive(count_noise_multiplier=count_noise))

"""The bound of one-run auditing against other ways to compute it, and against mechanisms as bad as allowed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tg_tinker_server.dp.calibration import noise_multiplier_for
from tg_tinker_server.empirical.bounds import epsilon_lower_bound, guess, lower_bound, most_provable, p_value


def tail_of_randomized_response(guesses: int, correct: int, epsilon: float) -> float:
    """By the sum over outcomes, in exact integers where it can be."""
    right = math.exp(epsilon) / (1 + math.exp(epsilon))
    return math.fsum(
        math.comb(guesses, k) * right**k * (1 - right) ** (guesses - k) for k in range(correct, guesses + 1)
    )


@pytest.mark.parametrize(("canaries", "most"), [(20, 1.8), (200, 4.2), (1000, 5.8), (5000, 7.3)], ids=str)
def test_the_power_is_that_of_the_paper(canaries: int, most: float) -> None:
    assert most_provable(canaries, delta=1e-5, confidence=0.95) == pytest.approx(most, abs=0.05)


@pytest.mark.parametrize("canaries", [20, 200, 1000, 5000])
def test_the_power_without_delta_has_a_closed_form(canaries: int) -> None:
    accuracy = 0.05 ** (1 / canaries)
    expected = math.log(accuracy / (1 - accuracy))
    assert most_provable(canaries, delta=0.0, confidence=0.95) == pytest.approx(expected, abs=1e-5)


@given(guesses=st.integers(1, 60), share=st.floats(0, 1), epsilon=st.floats(0, 5), abstained=st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_without_delta_it_is_the_tail_of_randomized_response(
    guesses: int, share: float, epsilon: float, abstained: int
) -> None:
    correct = round(share * guesses)
    found = p_value(canaries=guesses + abstained, guesses=guesses, correct=correct, epsilon=epsilon, delta=0.0)
    assert found == pytest.approx(tail_of_randomized_response(guesses, correct, epsilon), rel=1e-9)


@given(
    guesses=st.integers(1, 40),
    share=st.floats(0, 1),
    epsilon=st.floats(0, 4),
    delta=st.floats(1e-8, 1e-2),
    abstained=st.integers(0, 40),
)
@settings(max_examples=60, deadline=None)
def test_the_delta_term_is_that_of_the_theorem(
    guesses: int, share: float, epsilon: float, delta: float, abstained: int
) -> None:
    """2 m delta max_i (f(v - i) - f(v)) / i, with f the tail, summed anew for each i."""
    correct, m = round(share * guesses), guesses + abstained

    def f(v: int) -> float:
        return tail_of_randomized_response(guesses, max(v, 0), epsilon)

    extra = max(((f(correct - i) - f(correct)) / i for i in range(1, m + 1)), default=0.0)
    expected = min(1.0, f(correct) + 2 * m * delta * extra)
    found = p_value(canaries=m, guesses=guesses, correct=correct, epsilon=epsilon, delta=delta)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-2])
def test_no_mechanism_that_keeps_its_promise_is_refuted_more_often_than_said(epsilon: float, delta: float) -> None:
    """Each bit is shown with probability delta, else answered by randomized response: (epsilon, delta)-DP, and as
    telling as that allows. Its exact distribution stays under the bound at every number of right guesses."""
    m = 30
    right = delta + (1 - delta) / (1 + math.exp(-epsilon))
    for correct in range(m + 1):
        truth = float(stats.binom.sf(correct - 1, m, right))
        bound = p_value(canaries=m, guesses=m, correct=correct, epsilon=epsilon, delta=delta)
        assert truth <= bound + 1e-12


def test_a_lower_bound_is_where_the_p_value_crosses_the_level() -> None:
    args = {"canaries": 100, "guesses": 60, "correct": 55, "delta": 1e-5}
    epsilon = epsilon_lower_bound(**args, confidence=0.95)
    assert p_value(**args, epsilon=epsilon) < 0.05 <= p_value(**args, epsilon=epsilon + 2e-6)


def test_guesses_no_better_than_chance_prove_nothing() -> None:
    assert epsilon_lower_bound(canaries=100, guesses=100, correct=50, delta=1e-5, confidence=0.95) == 0.0


@pytest.mark.parametrize(
    ("guesses", "correct", "epsilon", "delta"),
    [(11, 5, 1, 0), (5, 6, 1, 0), (5, -1, 1, 0), (5, 5, -1, 0), (5, 5, 1, 1.5), (5, 5, math.nan, 0)],
)
def test_impossible_counts_are_refused(guesses: int, correct: int, epsilon: float, delta: float) -> None:
    with pytest.raises(ValueError, match="need"):
        p_value(canaries=10, guesses=guesses, correct=correct, epsilon=epsilon, delta=delta)


def test_high_scores_are_guessed_in_and_low_scores_out() -> None:
    scores = np.array([3.0, -3.0, 2.0, -2.0, 0.1, -0.1])
    included = np.array([True, False, True, False, False, True])
    assert guess(scores, included, 4).correct == 4
    assert guess(scores, included, 6).correct == 4
    assert guess(-scores, included, 4).correct == 0


def test_all_coins_are_told_apart_however_uneven_they_fell() -> None:
    included = np.arange(100) < 37
    assert guess(included * 1.0, included, 100).correct == 100


def test_honest_gaussian_noise_is_bounded_below_its_epsilon() -> None:
    """The bound stays under the truth, well above nothing, and the claim is never close to refuted."""
    rng = np.random.default_rng(0)
    sigma = noise_multiplier_for(target_epsilon=4.0, target_delta=1e-5, sample_rate=1.0, steps=1)
    found = []
    for _ in range(40):
        included = rng.random(500) < 0.5
        scores = included + sigma * rng.normal(size=500)
        found.append(lower_bound(scores, included, claimed_epsilon=4.0, delta=1e-5, confidence=0.95))
    assert max(b.epsilon for b in found) < 4.0
    assert np.median([b.epsilon for b in found]) > 0.5
    assert min(b.p_value for b in found) > 0.05


def test_scores_without_noise_reach_the_power() -> None:
    included = np.random.default_rng(1).random(1000) < 0.5
    found = lower_bound(included * 1.0, included, claimed_epsilon=4.0, delta=1e-6, confidence=0.95)
    assert found.epsilon == pytest.approx(found.power, abs=1e-5)
    assert found.power == pytest.approx(5.5, abs=0.1)
    assert found.p_value < 5e-4


def test_the_p_value_of_a_claim_pays_for_every_count_that_was_tried() -> None:
    rng = np.random.default_rng(3)
    included = rng.random(200) < 0.5
    found = lower_bound(included + rng.normal(size=200), included, claimed_epsilon=0.5, delta=1e-6, confidence=0.95)
    single = [
        p_value(canaries=200, guesses=g.guesses, correct=g.correct, epsilon=0.5, delta=1e-6) for g in found.tried
    ]
    assert len(single) == 2
    assert found.p_value == pytest.approx(2 * min(single))
    assert found.p_value < 1.0


def test_several_counts_of_guesses_share_the_error_probability() -> None:
    """Coins that have nothing to do with scores: a bound above 0 is wrong, and comes in at most 5 % of the runs."""
    rng = np.random.default_rng(2)
    wrong = 0
    for _ in range(400):
        found = lower_bound(
            rng.normal(size=60), rng.random(60) < 0.5, claimed_epsilon=1.0, delta=0.0, confidence=0.95
        )
        wrong += found.epsilon > 0
    assert wrong <= stats.binom.ppf(1 - 1e-4, 400, 0.05)

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types.sampling import GenerationOptions
from tg_tinker_server.engine.sampler import TokenCounts, choose, keep_top_k, keep_top_p, penalised, softmax

LOGITS = arrays(np.float64, (1, 6), elements=st.floats(-30, 30))


def draw(logits, params, *, count=1, prompts=((),), generated=(), seed=0):
    rng = np.random.default_rng(seed)
    counts = TokenCounts(prompts, len(logits), params)
    for token in generated:
        counts.add(0, token)
    rows = np.array([logits], dtype=np.float64)
    return [int(choose(rows, counts, [0], params, [rng])[0]) for _ in range(count)]


def test_repetition_divides_positive_logits_and_multiplies_negative_ones():
    params = GenerationOptions(repetition_penalty=2.0)
    seen = np.array([[True, True, False]])
    out = penalised(np.array([[2.0, -1.0, 3.0]]), seen, np.zeros((1, 3), dtype=np.int64), params)
    np.testing.assert_array_equal(out, [[1.0, -2.0, 3.0]])


def test_presence_counts_once_and_frequency_every_time_of_generated_text_only():
    params = GenerationOptions(presence_penalty=0.5, frequency_penalty=0.25)
    out = penalised(np.zeros((1, 3)), np.ones((1, 3), dtype=bool), np.array([[0, 1, 4]]), params)
    np.testing.assert_allclose(out, [[0.0, -0.75, -1.5]])


def test_repetition_sees_the_prompt_and_the_other_penalties_do_not():
    logits, greedy = [1.0, 0.9], {"temperature": 0.0}
    assert draw(logits, GenerationOptions(repetition_penalty=2.0, **greedy), prompts=[[0]]) == [1]
    assert draw(logits, GenerationOptions(presence_penalty=5.0, frequency_penalty=5.0, **greedy), prompts=[[0]]) == [
        0
    ]
    assert draw(logits, GenerationOptions(presence_penalty=5.0, **greedy), generated=[0]) == [1]


def test_penalties_come_before_temperature_and_top_k_before_top_p():
    # Penalised, token 0 loses its lead, so top_k=1 keeps token 1 at any temperature.
    params = GenerationOptions(presence_penalty=0.2, temperature=100.0, top_k=1)
    assert draw([1.0, 0.9, 0.0], params, generated=[0], count=5) == [1] * 5
    # Two tokens of equal weight are left by top_k, so top_p=0.5 keeps the first; over all four it would keep two.
    params = GenerationOptions(top_k=2, top_p=0.5)
    assert set(draw([0.0, 0.0, 0.0, 0.0], params, count=50)) == {0}


def test_temperature_comes_before_top_p():
    # Cold, token 0 holds nearly all probability and top_p keeps it alone; warm it would not.
    assert set(draw([1.0, 0.5, 0.0], GenerationOptions(temperature=0.05, top_p=0.9), count=50)) == {0}
    assert len(set(draw([1.0, 0.5, 0.0], GenerationOptions(temperature=5.0, top_p=0.9), count=200))) == 3


def test_temperature_zero_is_greedy():
    assert set(draw([0.0, 1.0, 0.999], GenerationOptions(temperature=0.0), count=20)) == {1}


@given(logits=LOGITS)
@settings(max_examples=100, deadline=None)
def test_top_k_of_one_is_greedy(logits):
    greedy = draw(logits[0], GenerationOptions(temperature=0.0))
    assert draw(logits[0], GenerationOptions(top_k=1)) == greedy


@given(logits=LOGITS, k=st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_top_k_keeps_exactly_the_k_most_likely(logits, k):
    kept = np.isfinite(keep_top_k(logits, k))[0]
    assert kept.sum() == min(k, 6)
    assert logits[0][kept].min() >= max(logits[0][~kept], default=-np.inf)


@given(logits=LOGITS, p=st.floats(0.01, 0.99))
@settings(max_examples=200, deadline=None)
def test_top_p_keeps_the_smallest_most_likely_set_that_reaches_p(logits, p):
    kept = np.isfinite(keep_top_p(logits, p))[0]
    probabilities = softmax(logits)[0]
    assert kept.any()
    assert probabilities[kept].sum() >= p - 1e-9
    assert probabilities[kept].sum() - probabilities[kept].min() < p + 1e-9
    assert logits[0][kept].min() >= max(logits[0][~kept], default=-np.inf)


def test_tokens_are_drawn_with_the_models_probabilities():
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    found = np.bincount(draw(logits, GenerationOptions(), count=20_000), minlength=4)
    assert stats.chisquare(found, np.array([0.5, 0.3, 0.15, 0.05]) * 20_000).pvalue > 1e-6


def test_temperature_sharpens_as_a_power():
    weights = np.array([0.5, 0.3, 0.2])
    expected = weights**2 / (weights**2).sum()
    found = np.bincount(draw(np.log(weights), GenerationOptions(temperature=0.5), count=20_000), minlength=3)
    assert stats.chisquare(found, expected * 20_000).pvalue > 1e-6


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1e6, 1e300])
def test_extreme_temperatures_stay_finite(temperature):
    found = set(draw([1000.0, 0.0, -1000.0], GenerationOptions(temperature=temperature), count=100))
    assert found == ({0} if temperature < 1 else {0, 1, 2})


def test_a_huge_frequency_penalty_lets_no_token_come_twice():
    params = GenerationOptions(temperature=0.0, frequency_penalty=1e9)
    counts, out = TokenCounts([[]], 5, params), []
    for _ in range(5):
        token = int(choose(np.zeros((1, 5)), counts, [0], params, [np.random.default_rng(0)])[0])
        counts.add(0, token)
        out.append(token)
    assert sorted(out) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_an_error_that_says_what_to_do(bad):
    with pytest.raises(InvalidRequestError, match="checkpoint") as e:
        draw([0.0, bad], GenerationOptions(temperature=0.0))
    assert e.value.field == "weights"

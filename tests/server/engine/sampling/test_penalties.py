"""Options of text: what penalties do to logits, and the order in which options apply."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from tests.server.engine.sampling import reference
from tg_tinker.errors import InvalidRequestError
from tg_tinker.types.sampling import GenerationOptions
from tg_tinker.types.tokens import SamplingParams
from tg_tinker_server.engine.sampling.choosing import Chooser, log_softmax
from tg_tinker_server.engine.sampling.penalties import Penalties, penalties_of

# Logits that differ by rounding alone would be decided by the last digit.
LOGITS = arrays(np.float64, (6,), elements=st.integers(-240, 240).map(lambda n: n / 8))


def chooser(options, *, size, prompt=(), seed=0):
    params = SamplingParams(temperature=options.temperature, top_k=options.top_k or -1, top_p=options.top_p)
    return Chooser(params, (seed, 0), topk=0, penalties=penalties_of(options, prompt=prompt, vocab_size=size))


def draw(logits, options, *, count=1, prompt=(), generated=(), seed=0):
    """So many first choices after the same text, from one stream."""
    it = chooser(options, size=len(logits), prompt=prompt, seed=seed)
    out = []
    for _ in range(count):
        if it._penalties is not None:
            it._penalties = penalties_of(options, prompt=prompt, vocab_size=len(logits))
            for token in generated:
                it._penalties.note(token)
        out.append(it.choose(np.array(logits, dtype=np.float64)).token)
    return out


def kept(logits, **params):
    """Which tokens may be chosen."""
    logprobs = log_softmax(logits.astype(np.float32))
    ids = Chooser(SamplingParams(**params), (0, 0), topk=0).kept(logprobs)
    out = np.zeros(logits.size, dtype=bool)
    out[slice(None) if ids is None else ids] = True
    return out


def test_repetition_divides_positive_logits_and_multiplies_negative_ones():
    penalties = Penalties(GenerationOptions(repetition_penalty=2.0), prompt=[0, 1], vocab_size=3)
    np.testing.assert_array_equal(penalties.applied(np.array([2.0, -1.0, 3.0])), [1.0, -2.0, 3.0])


def test_presence_counts_once_and_frequency_every_time_of_generated_text_only():
    options = GenerationOptions(presence_penalty=0.5, frequency_penalty=0.25)
    penalties = Penalties(options, prompt=[0, 1, 2], vocab_size=3)
    for token in (1, 2, 2, 2, 2):
        penalties.note(token)
    np.testing.assert_allclose(penalties.applied(np.zeros(3)), [0.0, -0.75, -1.5])


@given(
    logits=LOGITS,
    rate=st.floats(0.01, 100),
    presence=st.floats(-5, 5),
    frequency=st.floats(-5, 5),
    prompt=st.lists(st.integers(0, 5), max_size=4),
    generated=st.lists(st.integers(0, 5), max_size=8),
)
@settings(max_examples=100, deadline=None)
def test_penalties_are_what_their_definition_says(logits, rate, presence, frequency, prompt, generated):
    options = GenerationOptions(repetition_penalty=rate, presence_penalty=presence, frequency_penalty=frequency)
    penalties = Penalties(options, prompt=prompt, vocab_size=6)
    for token in generated:
        penalties.note(token)
    expected = reference.penalised(logits, options, prompt=prompt, generated=generated)
    np.testing.assert_allclose(penalties.applied(logits), expected, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("size", [1e308, -1e308])
def test_the_largest_penalties_leave_a_choice(size):
    options = GenerationOptions(presence_penalty=size, frequency_penalty=size)
    found = draw([0.0, 0.0, 0.0], options, generated=[0, 0, 0], count=20)
    assert set(found) == ({1, 2} if size > 0 else {0})


def test_repetition_sees_the_prompt_and_the_other_penalties_do_not():
    logits, greedy = [1.0, 0.9], {"temperature": 0.0}
    assert draw(logits, GenerationOptions(repetition_penalty=2.0, **greedy), prompt=[0]) == [1]
    assert draw(logits, GenerationOptions(presence_penalty=5.0, frequency_penalty=5.0, **greedy), prompt=[0]) == [0]
    assert draw(logits, GenerationOptions(presence_penalty=5.0, **greedy), generated=[0]) == [1]


def test_penalties_come_before_temperature_and_top_k_before_top_p():
    # Penalised, token 0 loses its lead, so top_k=1 keeps token 1 at any temperature.
    params = GenerationOptions(presence_penalty=0.2, temperature=100.0, top_k=1)
    assert draw([1.0, 0.9, 0.0], params, generated=[0], count=5) == [1] * 5
    # Two tokens of equal weight are left by top_k, so top_p=0.4 keeps the first; over all four it would keep two.
    params = GenerationOptions(top_k=2, top_p=0.4)
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
    greedy = draw(logits, GenerationOptions(temperature=0.0))
    assert draw(logits, GenerationOptions(top_k=1)) == greedy


@given(logits=LOGITS, k=st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_top_k_keeps_exactly_the_k_most_likely(logits, k):
    found = kept(logits, top_k=k)
    assert found.sum() == min(k, 6)
    assert logits[found].min() >= max(logits[~found], default=-np.inf) - 1e-5


@given(logits=LOGITS, p=st.floats(0.01, 0.99))
@settings(max_examples=200, deadline=None)
def test_top_p_keeps_the_smallest_most_likely_set_that_reaches_p(logits, p):
    found = kept(logits, top_p=p)
    probabilities = reference.softmax(logits)
    assert found.any()
    assert probabilities[found].sum() >= p - 1e-5
    assert probabilities[found].sum() - probabilities[found].min() < p + 1e-5
    assert logits[found].min() >= max(logits[~found], default=-np.inf) - 1e-5


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
    it = chooser(GenerationOptions(temperature=0.0, frequency_penalty=1e9), size=5)
    assert sorted(it.choose(np.zeros(5)).token for _ in range(5)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_an_error_that_says_what_to_do(bad):
    with pytest.raises(InvalidRequestError, match="checkpoint") as e:
        draw([0.0, bad], GenerationOptions(temperature=0.0))
    assert e.value.field == "weights"

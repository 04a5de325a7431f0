"""One sequence's choices, against their definitions and against whole sorts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.server.engine.sampling import reference
from tg_tinker.errors import InvalidRequestError
from tg_tinker.types.sampling import GenerationOptions
from tg_tinker.types.tokens import MISSING_LOGPROB, SamplingParams
from tg_tinker_server.engine.sampling.choosing import Chooser, draw, log_softmax, top_k

LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=30).map(lambda v: np.array(v, dtype=np.float32))


@given(LOGITS, st.floats(0.1, 5))
def test_log_probabilities_are_those_of_torch_on_tempered_logits(logits, temperature):
    expected = torch.log_softmax(torch.tensor(logits, dtype=torch.float64) / temperature, dim=-1)
    np.testing.assert_allclose(log_softmax(logits, temperature), expected, atol=2e-5, rtol=1e-6)


# Logits that differ by rounding alone, or a p that is hit exactly, would be decided by the last digit.
STEPS = st.lists(st.integers(-160, 160), min_size=2, max_size=30).map(lambda v: np.array(v, dtype=np.float32) / 8)
CUTS = st.sampled_from([0.1371, 0.5379, 0.9113, 1.0])


@given(STEPS, st.integers(0, 2**64 - 1), st.sampled_from([0.0, 0.3, 1.0, 2.0]), st.integers(1, 5), CUTS)
def test_it_chooses_what_whole_sorts_choose(logits, seed, temperature, k, p):
    """Two implementations: there whole sorts in float64, here only of what can be chosen."""
    params = SamplingParams(temperature=temperature, top_k=k, top_p=p)
    other = GenerationOptions(temperature=temperature, top_k=k, top_p=p)
    expected = reference.choose(logits, other, np.random.default_rng([seed, 0]).random())
    choice = Chooser(params, (seed, 0), topk=2).choose(logits)
    assert choice.token == expected
    assert choice.logprob == pytest.approx(log_softmax(logits, temperature or 1.0)[expected])
    plain = SamplingParams(temperature=temperature, top_p=p)
    other = GenerationOptions(temperature=temperature, top_p=p)
    expected = reference.choose(logits, other, np.random.default_rng([seed, 0]).random())
    assert Chooser(plain, (seed, 0), topk=0).choose(logits).token == expected


def test_frequencies_are_the_tempered_probabilities():
    logits = np.array([1.0, 0.0, -1.0, 2.0], dtype=np.float32)
    chooser = Chooser(SamplingParams(temperature=0.7), (5, 0), topk=0)
    drawn = np.bincount([chooser.choose(logits).token for _ in range(20_000)], minlength=4) / 20_000
    np.testing.assert_allclose(drawn, np.exp(log_softmax(logits, 0.7)), atol=0.015)


def test_alternatives_are_the_most_likely_first_and_filled_up():
    ids, found = top_k(np.array([-1.0, -0.5, -1.0], dtype=np.float32), 5)
    assert ids.tolist() == [1, 0, 2, 0, 0]
    assert found.tolist() == [-0.5, -1.0, -1.0, MISSING_LOGPROB, MISSING_LOGPROB]
    assert top_k(np.array([-1.0, -0.5, -1.0], dtype=np.float32), 2)[0].tolist() == [1, 0]


def test_a_token_of_probability_zero_is_never_drawn():
    weights = np.array([0.0, 1.0, 0.0], dtype=np.float32)
    assert {draw(weights, point) for point in (0.0, 0.5, np.nextafter(1.0, 0), 1.0)} == {1}


def test_a_tiny_temperature_is_greedy_and_not_an_overflow():
    logits = np.array([1.0, 3.0, 2.0], dtype=np.float32)
    choice = Chooser(SamplingParams(temperature=1e-300), (1, 1), topk=0).choose(logits)
    assert (choice.token, choice.logprob) == (1, 0.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(bad):
    with pytest.raises(InvalidRequestError, match="not finite"):
        Chooser(SamplingParams(), (1, 1), topk=0).choose(np.array([0.0, bad], dtype=np.float32))

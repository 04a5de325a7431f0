"""vLLM's numbers as events: the same ends, texts and alternatives as of the built-in sampler."""

from types import SimpleNamespace

import numpy as np
import pytest

from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker.types.sampling import GenerationOptions
from tg_tinker.types.tokens import SampleQuery, SamplingParams
from tg_tinker_server.engine.sampling.choosing import Chooser, log_softmax, top_k
from tg_tinker_server.engine.sampling.telling import TokenTeller
from tg_tinker_server.engine.sampling.text_query import TextQuery
from tg_tinker_server.engine.tokenizers import ByteTokenizer
from tg_tinker_server.engine.vllm.telling import SequenceTelling, most_likely

TOKENIZER = ByteTokenizer()
WEIGHTS = SimpleNamespace(
    vocab_size=TOKENIZER.vocab_size,
    max_positions=20,
    eos_token_ids=TOKENIZER.eos_token_ids,
    decode=TOKENIZER.decode,
)


def query(prompt=(1, 2, 3), *, topk=0, text=None, **params):
    common = {"prompt": tuple(prompt), "topk_sample_logprobs": topk, "params": SamplingParams(**params)}
    return SampleQuery(**common) if text is None else TextQuery(**common, options=text, first=4)


def rows_of(logits_TV, tokens, k):
    """What vLLM tells of tokens: its sampled one first, then the k most likely in any order."""
    rows = []
    for logits_V, token in zip(logits_TV, tokens, strict=True):
        logprobs_V = log_softmax(logits_V)
        best = np.argsort(-logprobs_V, kind="stable")[:k]
        rows.append([[t, float(logprobs_V[t])] for t in dict.fromkeys([token, *best[::-1].tolist()])])
    return rows


@pytest.mark.parametrize("topk", [0, 1, 5, 300])
def test_events_are_those_of_the_built_in_sampler(topk):
    logits_TV = np.random.default_rng(1).normal(size=(6, WEIGHTS.vocab_size)).astype(np.float32)
    asked = query(topk=min(topk, 128), max_tokens=6, stop=[])
    chooser, teller = Chooser(asked.params, (1, 0), topk=asked.topk_sample_logprobs), TokenTeller(WEIGHTS, asked, 0)
    expected, tokens = [], []
    for i, logits_V in enumerate(logits_TV):
        choice = chooser.choose(logits_V)
        tokens.append(choice.token)
        expected.append(teller.tell(choice, last=i == 5))
    rows = rows_of(logits_TV, tokens, asked.topk_sample_logprobs)
    told = SequenceTelling(WEIGHTS, asked, 0)
    events = told.tell(tokens[:2], rows[:2], ended=False) + told.tell(tokens[2:], rows[2:], ended=True)
    assert told.ended
    for ours, theirs in zip(expected, events, strict=True):
        assert (ours.index, ours.tokens, ours.logprobs) == (theirs.index, theirs.tokens, theirs.logprobs)
        assert ours.stop_reason == theirs.stop_reason
        assert (ours.topk_logprobs is None) == (theirs.topk_logprobs is None)
        if ours.topk_logprobs is not None:
            np.testing.assert_array_equal(ours.topk_logprobs.token_ids, theirs.topk_logprobs.token_ids)
            np.testing.assert_array_equal(ours.topk_logprobs.logprobs, theirs.topk_logprobs.logprobs)


def test_a_stop_text_ends_a_sequence_that_vllm_would_go_on_with():
    told = SequenceTelling(WEIGHTS, query(stop=["END"]), 0)
    tokens = list(b"an ENDing")
    events = told.tell(tokens, [[[t, -1.0]] for t in tokens], ended=False)
    assert bytes(e.tokens[0] for e in events) == b"an END"
    assert [e.stop_reason for e in events] == [None] * 5 + ["stop"]
    assert told.ended


def test_text_ends_before_its_stop_sequence():
    options = GenerationOptions(stop_sequences=("END",))
    told = SequenceTelling(WEIGHTS, query(text=options), 1)
    tokens = list(b"an ENDing")
    events = told.tell(tokens, [[[t, -1.0]] for t in tokens], ended=False)
    assert "".join(e.text for e in events) == "an "
    assert (events[-1].finish_reason, events[-1].index) == ("stop", 5)


def test_the_models_own_end_and_the_end_of_the_context_are_ends():
    (end,) = WEIGHTS.eos_token_ids
    told = SequenceTelling(WEIGHTS, query(), 0)
    assert told.tell([65, end], [[[65, -1.0]], [[end, -2.0]]], ended=True)[-1].stop_reason == "stop"
    full = SequenceTelling(WEIGHTS, query(range(19)), 0)
    assert full.room == 2  # the last token is not read, so it needs no position
    assert full.tell([65, 66], [[[65, -1.0]], [[66, -1.0]]], ended=True)[-1].stop_reason == "length"


@pytest.mark.parametrize(
    ("tokens", "rows", "ended"),
    [
        ([65], [], False),
        ([65], [[[66, -1.0]]], False),
        ([5000], [[[5000, -1.0]]], False),
        ([-1], [[[-1, -1.0]]], False),
        ([65], [[[65, -1.0]]], True),
        ([], [], True),
    ],
)
def test_an_answer_that_cannot_be_fails(tokens, rows, ended):
    with pytest.raises(ServerError, match="does not fit"):
        SequenceTelling(WEIGHTS, query(), 0).tell(tokens, rows, ended=ended)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_log_probabilities_that_are_no_numbers_fail_as_in_the_built_in_sampler(value):
    with pytest.raises(InvalidRequestError, match="not finite"):
        SequenceTelling(WEIGHTS, query(), 0).tell([65], [[[65, value]]], ended=False)


def test_most_likely_is_what_the_built_in_sampler_would_say():
    logprobs_V = log_softmax(np.random.default_rng(2).integers(0, 4, 12).astype(np.float32))
    found = dict(enumerate(logprobs_V.tolist()))
    for k in (1, 3, 12, 20):
        for ours, theirs in zip(top_k(logprobs_V, k), most_likely(found, k), strict=True):
            np.testing.assert_array_equal(ours, theirs)

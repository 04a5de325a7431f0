"""Requests over shared models: what each gets is what it would get alone, and what training and transformers say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.server.engine.conftest import Bench
from tests.server.engine.sampling.conftest import Sampling, prompts, training_logprobs
from tg_tinker.errors import InvalidRequestError
from tg_tinker.types.tokens import MISSING_LOGPROB, PromptFigures
from tg_tinker_server.engine.sampling import token_sampler
from tg_tinker_server.engine.sampling.bigram_rows import BigramRows
from tg_tinker_server.engine.sampling.token_sampler import BatchedSampler
from tg_tinker_server.engine.torch_backend import TorchBackend

GREEDY = {"temperature": 0.0, "max_tokens": 8}


def everything(response):
    return [(s.tokens, s.stop_reason) for s in response.sequences]


def numbers(response):
    return np.array([p for s in response.sequences for p in s.logprobs])


def test_log_probabilities_are_those_of_training_for_several_runs_in_one_batch(sampling):
    runs = [sampling.run(seed) for seed in (1, 2, 3)]
    texts = prompts(5, 12, 9)
    tickets = [
        sampling.submit(weights, text, prompt_logprobs=True, num_samples=2, params={"max_tokens": 6, "seed": 4})
        for (_, weights), text in zip(runs, texts, strict=True)
    ]
    found = sampling.results()
    for (session, _), text, ticket in zip(runs, texts, tickets, strict=True):
        response = found[ticket]
        for sequence in response.sequences:
            expected = training_logprobs(session, [*text, *sequence.tokens])
            assert response.prompt_logprobs[0] is None
            mine = [*response.prompt_logprobs[1:], *sequence.logprobs]
            np.testing.assert_allclose(mine, expected, atol=1e-5)


def test_a_remembered_prompt_gives_the_same_figures(sampling):
    session, weights = sampling.run()
    (text,) = prompts(20)
    fresh = sampling.one(weights, text, params=GREEDY)
    again = sampling.one(weights, text, params=GREEDY)
    longer = sampling.one(weights, [*text, *fresh.sequences[0].tokens, 7, 8], params=GREEDY)
    scored = sampling.one(weights, text, params=GREEDY, prompt_logprobs=True, prompt_logprobs_last_n=3)
    whole = sampling.one(weights, text, params=GREEDY, prompt_logprobs=True)
    assert [r.prompt_cache_hit_tokens for r in (fresh, again, longer, scored, whole)] == [0, 19, 27, 16, 0]
    assert everything(again) == everything(fresh)
    np.testing.assert_allclose(numbers(again), numbers(fresh), atol=1e-5)
    expected = training_logprobs(session, [*text, *fresh.sequences[0].tokens, 7, 8, *longer.sequences[0].tokens])
    np.testing.assert_allclose(longer.sequences[0].logprobs, expected[-8:], atol=1e-5)
    assert scored.prompt_logprobs[:17] == [None] * 17
    np.testing.assert_allclose(scored.prompt_logprobs[17:], expected[16:19], atol=1e-5)
    np.testing.assert_allclose(whole.prompt_logprobs[1:], expected[:19], atol=1e-5)


def test_prompts_that_come_together_and_begin_alike_are_read_once(sampling):
    _, weights = sampling.run()
    (text,) = prompts(40)
    tickets = [sampling.submit(weights, [*text, i], params=GREEDY) for i in range(4)]
    found = sampling.results()
    assert [found[t].prompt_cache_hit_tokens for t in tickets] == [0, 40, 40, 40]
    for i, ticket in enumerate(tickets):
        alone = sampling.one(weights, [*text, i], params=GREEDY)
        assert everything(found[ticket]) == everything(alone)


def test_weights_share_no_memory_of_prompts(sampling):
    (_, one), (_, other) = sampling.run(1), sampling.run(2)
    (text,) = prompts(30)
    sampling.one(one, text, params=GREEDY)
    assert sampling.one(other, text, params=GREEDY).prompt_cache_hit_tokens == 0
    assert sampling.one(sampling.base(), text, params=GREEDY).prompt_cache_hit_tokens == 0


def test_company_changes_nothing(sampling):
    """Requests that join and leave at all times, of three runs and the base, against each alone."""
    weights = [*(sampling.run(seed)[1] for seed in (1, 2)), sampling.base()]
    cases = [
        (weights[i % 3], text, {"params": {"max_tokens": 3 + 5 * (i % 4), "seed": i, "temperature": 0.8}, **options})
        for i, (text, options) in enumerate(
            (text, {"num_samples": 1 + i % 3, "topk_sample_logprobs": 2})
            for i, text in enumerate(prompts(1, 9, 30, 4, 17, 2, 25, 6, 40, 3, 11, 8))
        )
    ]
    alone = [sampling.one(w, text, group=i, **options) for i, (w, text, options) in enumerate(cases)]
    tickets = []
    for w, text, options in cases:
        tickets.append(sampling.submit(w, text, **options))
        sampling.step(2)
    found = sampling.results()
    for ticket, expected in zip(tickets, alone, strict=True):
        got = found[ticket]
        assert everything(got) == everything(expected)
        np.testing.assert_allclose(numbers(got), numbers(expected), atol=1e-5)
        for mine, theirs in zip(got.sequences, expected.sequences, strict=True):
            np.testing.assert_array_equal(mine.topk_logprobs.token_ids, theirs.topk_logprobs.token_ids)


@pytest.mark.parametrize("name", ["tiny", "qwen", "gpt2", "opt"])
def test_greedy_is_what_transformers_generates(torch_sampling, name):
    weights = torch_sampling.base(name)
    texts = prompts(5, 11, 1, 23)
    tickets = [torch_sampling.submit(weights, text, params={**GREEDY, "max_tokens": 15}) for text in texts]
    found = torch_sampling.results()
    with weights.base.bare():
        for text, ticket in zip(texts, tickets, strict=True):
            out = weights.base.module.generate(
                torch.tensor([text]), max_new_tokens=15, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            assert found[ticket].sequences[0].tokens == out[0, len(text) :].tolist()


def test_a_model_whose_positions_depend_on_the_width_is_sampled_alone_and_right(tools):
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    backend = TorchBackend({"dynamic": tools.seeded(lambda: tools.tiny_llama(rope_parameters=dynamic))})
    sampling = Sampling(Bench(backend, "dynamic"))
    weights = sampling.base()
    tickets = [sampling.submit(weights, text, params=GREEDY, prompt_logprobs=True) for text in prompts(6, 3)]
    found = sampling.results()
    for text, ticket in zip(prompts(6, 3), tickets, strict=True):
        tokens = [*text, *found[ticket].sequences[0].tokens]
        with torch.no_grad():
            expected = [
                weights.base.module(torch.tensor([tokens[:n]])).logits[0, -1].log_softmax(-1)[tokens[n]].item()
                for n in range(len(text), len(tokens))
            ]
        np.testing.assert_allclose(found[ticket].sequences[0].logprobs, expected, atol=1e-5)
        assert found[ticket].prompt_cache_hit_tokens == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_config": None},
        {"lora": {"modules_to_save": ["lm_head"]}},
        {"lora": {"target_modules": ["q_proj", "embed_tokens"]}},
        {"lora": {"target_modules": ["lm_head", "v_proj"]}},
    ],
    ids=["whole", "saved", "embedding", "head"],
)
def test_every_kind_of_run_is_sampled_as_it_trains(torch_sampling, settings):
    session, weights = torch_sampling.run(5, **settings)
    plain, beside = torch_sampling.run(6)
    base = torch_sampling.base()
    (text,) = prompts(12)
    tickets = [torch_sampling.submit(w, text, params=GREEDY, prompt_logprobs=True) for w in (weights, beside, base)]
    found = torch_sampling.results()
    for known, ticket in ((session, tickets[0]), (plain, tickets[1])):
        sequence = found[ticket].sequences[0]
        expected = training_logprobs(known, [*text, *sequence.tokens])
        np.testing.assert_allclose(found[ticket].prompt_logprobs[1:], expected[:11], atol=1e-5)
        np.testing.assert_allclose(sequence.logprobs, expected[11:], atol=1e-5)
    with torch.no_grad(), base.base.bare():
        tokens = [*text, *found[tickets[2]].sequences[0].tokens]
        expected = base.base.module(torch.tensor([tokens])).logits[0].log_softmax(-1)
    np.testing.assert_allclose(
        found[tickets[2]].sequences[0].logprobs, [expected[i - 1, tokens[i]] for i in range(12, 20)], atol=1e-5
    )


def test_a_seed_repeats_its_samples_which_differ_from_each_other(sampling):
    weights = sampling.base()
    ask = {"num_samples": 4, "params": {"max_tokens": 12, "seed": 2**64 - 1}}
    first, second = (sampling.one(weights, [1, 2, 3], **ask) for _ in range(2))
    assert everything(first) == everything(second)
    assert len({tuple(s.tokens) for s in first.sequences}) == 4
    other = sampling.one(weights, [1, 2, 3], num_samples=4, params={"max_tokens": 12, "seed": 5})
    assert everything(other) != everything(first)
    free = [sampling.one(weights, [1, 2, 3], params={"max_tokens": 12}).sequences[0].tokens for _ in range(2)]
    assert free[0] != free[1]


def test_cancelling_frees_the_rows_at_once_and_leaves_the_others(sampling):
    weights = sampling.base()
    alone = sampling.one(weights, [5, 6], params={"max_tokens": 30, "seed": 1})
    gone = sampling.submit(weights, [1, 2], num_samples=3, params={"max_tokens": 50, "seed": 2})
    stays = sampling.submit(weights, [5, 6], params={"max_tokens": 30, "seed": 1})
    sampling.step(6)
    sampling.events.pop(gone)
    sampling.sampler.cancel(gone)
    rows = [s.request for b in sampling.sampler._batches.values() for s in b.sequences]
    assert rows == [stays]
    found = sampling.results()
    assert gone not in found
    assert everything(found[stays]) == everything(alone)
    waiting = sampling.submit(weights, [1], params=GREEDY)
    sampling.sampler.cancel(waiting)
    sampling.sampler.cancel(waiting)
    assert sampling.sampler.idle


def test_a_small_request_does_not_wait_for_a_huge_one(bench, monkeypatch):
    monkeypatch.setattr(token_sampler, "TURN_TOKENS", 4)
    rows = bench.backend.token_sampler()._model
    sampling = Sampling(bench, BatchedSampler(rows, most_rows=3, prefix_bytes=2**20, prefill_tokens=16))
    weights = sampling.base()
    huge = sampling.submit(weights, prompts(12)[0], num_samples=20, params={"max_tokens": 50, "seed": 1})
    sampling.step(8)
    small = sampling.submit(weights, [1, 2], params={"max_tokens": 3, "seed": 9})
    steps = 0
    while not isinstance(sampling.events.get(small, [None])[-1], PromptFigures):
        sampling.step()
        steps += 1
    assert steps < 20
    assert not isinstance(sampling.events[huge][-1], PromptFigures)
    assert sum(len(b.sequences) for b in sampling.sampler._batches.values()) <= 3


def test_taking_turns_changes_nothing(bench, monkeypatch):
    monkeypatch.setattr(token_sampler, "TURN_TOKENS", 3)
    rows = bench.backend.token_sampler()._model
    narrow = Sampling(bench, BatchedSampler(rows, most_rows=2, prefix_bytes=1, prefill_tokens=7))
    wide = Sampling(bench)
    cases = [
        (text, {"num_samples": 3, "params": {"max_tokens": 14, "seed": i}})
        for i, text in enumerate(prompts(20, 3, 9))
    ]
    weights = narrow.run()[1]
    expected = [wide.one(weights, text, group=i, **options) for i, (text, options) in enumerate(cases)]
    tickets = [narrow.submit(weights, text, **options) for text, options in cases]
    found = narrow.results()
    for ticket, alone in zip(tickets, expected, strict=True):
        assert everything(found[ticket]) == everything(alone)
        np.testing.assert_allclose(numbers(found[ticket]), numbers(alone), atol=1e-5)


def test_diverged_weights_fail_their_own_requests_only(sampling):
    _, good = sampling.run(1)
    _, bad = sampling.run(2)
    if hasattr(bad, "adapter"):
        for name, p in bad.base.module.named_parameters():
            if bad.adapter in name:
                p.data.fill_(float("nan"))
    else:
        bad._weights_VV[:] = np.nan
    alone = sampling.one(good, [1, 2, 3], params=GREEDY)
    tickets = [sampling.submit(w, [1, 2, 3], params=GREEDY) for w in (bad, good, bad)]
    found = sampling.results()
    assert everything(found[tickets[1]]) == everything(alone)
    for ticket in (tickets[0], tickets[2]):
        assert isinstance(found[ticket], InvalidRequestError)
        assert "not finite" in found[ticket].message


def test_what_does_not_fit_is_refused_by_name(sampling):
    weights = sampling.base()
    size, room = weights.vocab_size, weights.max_positions
    for prompt, word in (([], "empty"), ([size], "vocabulary"), ([-1], "vocabulary"), ([1] * (room + 1), str(room))):
        with pytest.raises(InvalidRequestError, match=word) as caught:
            sampling.submit(weights, prompt)
        assert caught.value.field == "prompt"
    with pytest.raises(InvalidRequestError, match="target_prompt_logprobs"):
        sampling.submit(weights, [1, 2], target_prompt_logprobs=np.array([0, size]))
    assert sampling.sampler.idle


def test_a_context_can_be_filled_to_its_last_token(torch_sampling):
    session, weights = torch_sampling.run()
    room = weights.max_positions
    (text,) = prompts(room - 3)
    found = torch_sampling.one(weights, text, params={"temperature": 0.0})
    assert (len(found.sequences[0].tokens), found.sequences[0].stop_reason) == (4, "length")
    full = torch_sampling.one(weights, prompts(room)[0], prompt_logprobs=True, params={"max_tokens": 9})
    assert len(full.sequences[0].tokens) == 1
    np.testing.assert_allclose(full.prompt_logprobs[1:], training_logprobs(session, prompts(room)[0]), atol=1e-5)


def test_stops_end_a_sequence_and_are_part_of_it(sampling):
    weights = sampling.base()
    params = {"seed": 3, "max_tokens": 400}
    free = sampling.one(weights, [65], params=params).sequences[0]
    at = next(i for i, t in enumerate(free.tokens) if i > 3 and t < 128 and t not in free.tokens[:i])
    token = free.tokens[at]
    by_token = sampling.one(weights, [65], params={**params, "stop": [token]}).sequences[0]
    assert (by_token.tokens, by_token.stop_reason) == (free.tokens[: at + 1], "stop")
    by_text = sampling.one(weights, [65], params={**params, "stop": chr(token)}).sequences[0]
    assert (by_text.tokens, by_text.stop_reason) == (free.tokens[: at + 1], "stop")
    if 257 in free.tokens:
        default = sampling.one(weights, [65], params={**params, "stop": None}).sequences[0]
        assert default.tokens == free.tokens[: free.tokens.index(257) + 1]


def test_the_models_own_end_of_text_stops_a_sequence(sampling):
    weights = sampling.base()
    found = sampling.one(weights, [65], num_samples=30, params={"seed": 1, "stop": None, "max_tokens": 60})
    stopped = [s for s in found.sequences if s.stop_reason == "stop"]
    assert stopped, "no sample of this seed ends by itself"
    assert all(s.tokens[-1] == 257 and 257 not in s.tokens[:-1] for s in stopped)


def test_figures_of_a_prompt_are_those_of_its_logits(sampling):
    session, weights = sampling.run()
    (text,) = prompts(9)
    targets = np.array([[1, 2], [3, -1], [-1, -1], *[[4, 5]] * 6])
    found = sampling.one(
        weights,
        text,
        prompt_logprobs=True,
        topk_prompt_logprobs=3,
        target_prompt_logprobs=targets,
        prompt_alt_tokens_k=128,
        params={"max_tokens": 1, "seed": 3, "temperature": 0.5},
    )
    for at in range(1, 9):
        row = [training_logprobs(session, [*text[:at], t])[-1] for t in range(6)]
        for j in (0, 1):
            if targets[at, j] < 0:
                assert np.isnan(found.target_prompt_logprobs[at, j])
            else:
                assert found.target_prompt_logprobs[at, j] == pytest.approx(row[targets[at, j]], abs=1e-5)
        best = found.topk_prompt_logprobs
        assert (np.diff(best.logprobs[at]) <= 0).all()
        assert best.logprobs[at, 0] >= max(row) - 1e-6
        some = best.token_ids[at, 1]
        assert best.logprobs[at, 1] == pytest.approx(training_logprobs(session, [*text[:at], some])[-1], abs=1e-5)
        drawn = found.prompt_alt_tokens
        one = drawn.token_ids[at, 7]
        assert drawn.logprobs[at, 7] == pytest.approx(training_logprobs(session, [*text[:at], one])[-1], abs=1e-5)
    assert np.isnan(found.target_prompt_logprobs[0]).all()
    assert (found.prompt_alt_tokens.logprobs[0] == MISSING_LOGPROB).all()
    assert (found.topk_prompt_logprobs.logprobs[0] == MISSING_LOGPROB).all()


def test_draws_for_the_prompt_follow_the_tempered_prediction():
    class Weights:
        vocab_size, max_positions, eos_token_ids, closed, version = 4, 100, (), False, 0

        def logits(self, tokens):
            return np.tile(np.array([1.0, 0.0, -1.0, 2.0]), (len(tokens), 1))

        def decode(self, ids):
            return ""

        def when_closed(self, tell):
            pass

    sampling = Sampling(None, BatchedSampler(BigramRows(), most_rows=4, prefix_bytes=100))
    found = sampling.one(
        Weights(), [0] * 80, prompt_alt_tokens_k=128, params={"max_tokens": 1, "seed": 3, "temperature": 0.5}
    )
    drawn = found.prompt_alt_tokens.token_ids[1:].ravel()
    expected = np.exp(np.array([1.0, 0.0, -1.0, 2.0]) / 0.5)
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / drawn.size, expected / expected.sum(), atol=0.015)
    untempered = np.log(np.exp([1.0, 0.0, -1.0, 2.0]) / np.exp([1.0, 0.0, -1.0, 2.0]).sum())
    np.testing.assert_allclose(found.prompt_alt_tokens.logprobs[1:].ravel(), untempered[drawn], atol=1e-6)


def test_closed_weights_leave_the_base_as_it_was(torch_sampling):
    base = torch_sampling.base()
    before = torch_sampling.one(base, [1, 2, 3], group=1, params=GREEDY)
    _, weights = torch_sampling.run(scale=1.0)
    assert everything(torch_sampling.one(weights, [1, 2, 3], params=GREEDY)) != everything(before)
    adapters = weights.base.adapters
    weights.close()
    weights.close()
    assert weights.base.adapters == adapters - 1
    after = torch_sampling.one(torch_sampling.base(), [1, 2, 3], group=2, params=GREEDY)
    assert numbers(after).tolist() == numbers(before).tolist()


def test_one_target_for_each_position_has_the_figures_of_the_prompt_itself(sampling):
    _, weights = sampling.run()
    (text,) = prompts(9)
    found = sampling.one(
        weights,
        text,
        prompt_logprobs=True,
        prompt_logprobs_last_n=0,
        target_prompt_logprobs=np.array([-1, -1, *text[2:]]),
        params=GREEDY,
    )
    whole = sampling.one(weights, text, prompt_logprobs=True, params=GREEDY)
    assert found.prompt_logprobs == [None] * 9
    assert np.isnan(found.target_prompt_logprobs[:2]).all()
    np.testing.assert_allclose(found.target_prompt_logprobs[2:], whole.prompt_logprobs[2:], atol=1e-6)


def test_groups_do_not_share_a_run_through_the_model(sampling):
    weights = sampling.base()
    tickets = [sampling.submit(weights, text, group=i, params=GREEDY) for i, text in enumerate(prompts(5, 9))]
    while not sampling.sampler._batches:
        sampling.step()
    sampling.step()
    batches = [{s.request.group for s in b.sequences} for b in sampling.sampler._batches.values()]
    assert all(len(groups) == 1 for groups in batches)
    found = sampling.results()
    assert all(len(found[t].sequences[0].tokens) == 8 for t in tickets)

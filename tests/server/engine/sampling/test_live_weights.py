"""Text from the weights of a run as they are now: while it trains, while they rest, and when it is closed."""

import numpy as np
import pytest
import torch

from tests.server.engine.sampling.texts import PROMPTS, Texts, collect
from tg_tinker.errors import ServerError
from tg_tinker_server.engine.backend import EngineState, StepRequest
from tg_tinker_server.engine.sampling.text_query import SampledText
from tg_tinker_server.engine.sampling.token_sampler import BatchedSampler


def test_other_sessions_may_train_between_slices(torch_bench, tools):
    session, other = (
        torch_bench.open(),
        torch_bench.open(dp={}, lora={"target_modules": "all-linear", "dropout": 0.3}),
    )
    expected = collect(session, PROMPTS, max_tokens=10, seed=1)
    texts = Texts(session)
    texts.ask(PROMPTS, max_tokens=10, seed=1)
    while not texts.sampler.idle:
        texts.step()
        assert torch.is_grad_enabled()
        tools.accumulate(other, tools.batch())
        other.step(StepRequest(learning_rate=0.1))
    assert texts.results() == expected


def test_a_session_closed_between_slices_says_so_and_leaves_the_others(bench):
    session, other = bench.open(), bench.open()
    expected = collect(other, PROMPTS, max_tokens=10, seed=1)
    texts = Texts(session)
    neighbour = Texts(other, texts.sampler)
    texts.ask(PROMPTS, max_tokens=10, seed=1)
    neighbour.ask(PROMPTS, max_tokens=10, seed=1)
    mine = {id(r) for r in texts.sampler._requests() if r.weights is texts.weights}
    for _ in range(4):
        neighbour.step()
    session.close()
    failed = [p for p in texts.sampler.step() if p.error is not None]
    assert {id(p.ticket) for p in failed} == mine
    assert all(isinstance(p.error, ServerError) and "closed" in str(p.error) for p in failed)
    assert all(r.weights is neighbour.weights for r in texts.sampler._requests())
    neighbour.results()
    assert collect(other, PROMPTS, sampler=texts.sampler, max_tokens=10, seed=1) == expected
    with pytest.raises(ServerError, match="closed"):
        session.live_weights()


def test_nothing_is_kept_of_a_closed_session(bench):
    session, other = bench.open(), bench.open()
    texts = Texts(session)
    for one in (session, other):
        Texts(one, texts.sampler).ask(PROMPTS, max_tokens=1, seed=1)
    while not texts.sampler.idle:
        texts.step()
    kept = texts.sampler._cache.size_bytes
    session.close()
    assert texts.sampler._cache.size_bytes == kept / 2 > 0
    assert list(texts.sampler._versions) == [other.live_weights()]


def train(session, tools):
    tools.accumulate(session, tools.batch())
    session.step(StepRequest(learning_rate=0.5))


def randomise(session):
    state, rng = session.export_state(optimizer=False), np.random.default_rng(8)
    tensors = {k: rng.normal(0, 0.5, v.shape).astype(np.float32) for k, v in state.tensors.items()}
    session.import_state(EngineState(tensors=tensors, scalars=state.scalars), optimizer=False)


def test_what_was_read_is_forgotten_when_the_weights_change(bench, tools):
    session, prompt = bench.open(), list(b"the patient was seen for")
    texts = Texts(session)
    options = {"max_tokens": 8, "temperature": 0.0}
    for _ in range(2):
        texts.ask([prompt], **options)
        before = texts.results()
    assert texts.hits == [0, len(prompt) - 1]
    randomise(session)
    for _ in range(2):
        texts.ask([prompt], **options)
        assert texts.results() == collect(session, [prompt], **options) != before
    assert texts.hits[2:] == [0, len(prompt) - 1]
    train(session, tools)
    texts.ask([prompt], **options)
    texts.results()
    assert texts.hits[4:] == [0]


@pytest.mark.parametrize("slices", [0, 1, 2, 5])
def test_what_a_request_read_with_older_weights_serves_it_alone(bench, tools, slices):
    session, prompt = bench.open(), list(range(40))
    options = {"max_tokens": 8, "temperature": 0.0}
    rows = Texts(session).sampler._model
    texts = Texts(session, BatchedSampler(rows, most_rows=4, prefix_bytes=2**24, prefill_tokens=20))
    texts.ask([prompt], **options)
    for _ in range(slices):
        texts.step()
    train(session, tools)
    texts.results()
    texts.ask([prompt], **options)
    assert texts.results() == collect(session, [prompt], **options)
    assert texts.hits == [0, 0 if slices else len(prompt) - 1]


def test_resting_weights_go_through_no_model_and_others_do(bench, monkeypatch):
    session, other = bench.open(), bench.open()
    options = {"max_tokens": 10, "seed": 1}
    expected = collect(session, PROMPTS, **options)
    texts = Texts(session)
    seen, model = [], texts.sampler._model
    neighbour = Texts(other, texts.sampler)
    texts.ask(PROMPTS, **options)
    neighbour.ask([[9, 9]], max_tokens=200, seed=3)
    told, read = [], model.read
    monkeypatch.setattr(model, "read", lambda readings: seen.extend(r.weights for r in readings) or read(readings))
    for number in range(60):
        resting = [texts.weights] if number % 5 else []
        seen.clear()
        news = [(p.ticket.weights, e) for p in texts.sampler.step(resting) for e in p.events]
        running = {s.request.weights for b in texts.sampler._batches.values() for s in b.sequences}
        if resting:
            assert texts.weights not in running
            assert texts.weights not in seen
            begun = [e for w, e in news if w is texts.weights]
            assert not any(len([t for t in told if t.index == e.index]) for e in begun), "a model ran"
        told += [e for w, e in news if w is texts.weights and isinstance(e, SampledText)]
    assert len(told) > 3
    while not texts.sampler.idle:
        told += [e for p in texts.sampler.step() if p.ticket.weights is texts.weights for e in p.events]
    tokens = [sum((e.tokens for e in told if isinstance(e, SampledText) and e.index == i), ()) for i in range(3)]
    assert tokens == [t for t, _, _ in expected]


def test_all_at_rest_nothing_moves(bench):
    texts = Texts(bench.open())
    texts.ask(PROMPTS, max_tokens=5, seed=1)
    assert texts.sampler.step([texts.weights]) == []
    texts.step()
    texts.step()
    for _ in range(3):
        texts.step([texts.weights])
    assert not texts.sampler._batches
    assert len(texts.results()) == 3


def test_prompts_of_resting_weights_are_not_read_and_those_behind_them_are(bench):
    texts, beside = Texts(bench.open()), bench.open()
    neighbour = Texts(beside, texts.sampler)
    texts.ask(PROMPTS, max_tokens=5, seed=1)
    neighbour.ask([[9, 9]], max_tokens=1, seed=3)
    texts.sampler.step([texts.weights])
    waiting = [r.weights for r in texts.sampler._unread.requests]
    assert waiting == [texts.weights] * 3
    texts.sampler.step([texts.weights])
    assert [r.weights for r in texts.sampler._requests()] == [texts.weights] * 3
    assert len(texts.results()) == 3

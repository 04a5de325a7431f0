"""Whatever one session does, the others' weights and losses are bit for bit the same."""

import numpy as np
import pytest
import torch

from tg_tinker.errors import TGTinkerError
from tg_tinker.types import BatchData
from tg_tinker.types.sampling import GenerationOptions
from tg_tinker_server.engine.backend import EngineState, PassRequest
from tg_tinker_server.engine.sampling.text_query import text_queries
from tg_tinker_server.engine.sampling.token_sampler import BatchedSampler
from tg_tinker_server.engine.sampling.torch_rows import TorchRows


class ModuleCrash(RuntimeError):
    pass


def crash_in(session, when, *, on_call=1):
    """Make a module with this session's adapter fail in the forward or backward pass of its nth micro-batch."""
    module = next(m for m in session.base.module.modules() if session.adapter in getattr(m, "lora_B", ()))

    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) >= on_call:
            raise ModuleCrash

    if when == "forward":
        return module.register_forward_hook(fail)
    return module.register_full_backward_hook(fail)


def poison_weights(session, tools):
    with torch.no_grad():
        for parameter in session.parameters.values():
            parameter.fill_(float("nan"))


def begin_sample(session, prompt):
    """A sampler of its own with one request for text."""
    sampler = BatchedSampler(TorchRows(), most_rows=4, prefix_bytes=2**20)
    weights = session.live_weights()
    for query in text_queries(weights, [prompt], GenerationOptions(max_tokens=9, seed=1), completions=8):
        sampler.submit(weights, query, group=0)
    return sampler


def misbehave(session, tools, kind):
    """One bad act of a tenant; it may raise, it may not."""
    batch = tools.batch(3, seed=99)
    try:
        if kind == "nan weights":
            saved = session.export_state(optimizer=True)
            poison_weights(session, tools)
            try:
                tools.accumulate(session, batch)
                tools.step(session)
            finally:
                session.import_state(saved, optimizer=True)
        elif kind == "oversized":
            tools.accumulate(session, BatchData(input_ids=np.ones((2, 5000), dtype=np.int64)))
        elif kind == "unknown ids":
            tools.accumulate(session, BatchData(input_ids=[[99999]]))
        elif kind == "nan state":
            state = session.export_state(optimizer=False)
            wrong = {k: np.full_like(v, np.nan) for k, v in state.tensors.items()}
            session.import_state(EngineState(tensors=wrong, scalars=state.scalars), optimizer=False)
        elif kind == "diverging step":
            tools.accumulate(session, batch)
            tools.step(session, 3e38)
        elif kind.startswith("crash"):
            handle = crash_in(session, kind.split()[-1])
            try:
                tools.run_pass(session, batch)
            finally:
                handle.remove()
        elif kind == "half a sample":
            sampler = begin_sample(session, [1, 2, 3])
            sampler.step()
            sampler.step()
            assert not sampler.idle
    except (TGTinkerError, ModuleCrash):
        return True
    return False


KINDS = {
    "nan weights": None,
    "oversized": True,
    "unknown ids": True,
    "nan state": True,
    "diverging step": None,
    "crash in forward": True,
    "crash in backward": True,
    "half a sample": False,
}


def train(session, tools, *, between=lambda: None):
    losses = []
    for seed in range(4):
        losses.append(tools.accumulate(session, tools.batch(3, seed=seed), seed=seed).loss)
        between()
        tools.step(session, 0.05)
        between()
    return losses, tools.weights_of(session)


@pytest.fixture
def undisturbed(fresh_bench, tools):
    session = fresh_bench.open(lora={"dropout": 0.2})
    result = train(session, tools)
    session.close()
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dp", [None, {"max_grad_norm": 0.1}])
def test_a_misbehaving_session_leaves_its_neighbour_bit_for_bit(fresh_bench, tools, undisturbed, kind, dp):
    other = fresh_bench.open(dp=dp, lora={"target_modules": "all-linear"})
    session = fresh_bench.open(lora={"dropout": 0.2})
    outcomes = []
    disturbed = train(session, tools, between=lambda: outcomes.append(misbehave(other, tools, kind)))
    assert disturbed == undisturbed
    if KINDS[kind] is not None:
        assert outcomes == [KINDS[kind]] * 8


@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("on_call", [1, 2])
@pytest.mark.parametrize("dp", [None, {"max_grad_norm": 0.1}, {"max_grad_norm": 0.1, "merge_units": True}])
def test_a_session_whose_pass_crashed_goes_on_as_if_it_had_never_been_sent(fresh_bench, tools, when, on_call, dp):
    losses = []
    for crashes in (False, True):
        session = fresh_bench.open(dp=dp)
        if crashes:
            handle = crash_in(session, when, on_call=on_call)
            with pytest.raises(ModuleCrash):
                tools.run_pass(session, tools.batch(5))
            handle.remove()
        assert session.pending_calls == 0
        result = tools.accumulate(session, tools.batch(4))
        losses.append((result.loss, result.contribution.digest()))
        session.close()
    assert losses[0] == losses[1]


def test_a_step_that_fails_inside_the_optimizer_changes_nothing(fresh_bench, tools, monkeypatch):
    session = fresh_bench.open(dp={"max_grad_norm": 0.1})
    tools.accumulate(session, tools.batch())
    tools.step(session, mechanism=tools.mechanism(1.0, 0.1))
    tools.accumulate(session, tools.batch())
    before = tools.weights_of(session)
    real = session._torch_optimizer.step

    def half_way(*args):
        real(*args)
        raise ModuleCrash

    monkeypatch.setattr(session._torch_optimizer, "step", half_way)
    with pytest.raises(ModuleCrash):
        tools.step(session, mechanism=tools.mechanism(1.0, 0.1))
    monkeypatch.undo()
    assert tools.weights_of(session) == before
    assert session.pending_calls == 1
    tools.step(session, mechanism=tools.mechanism(1.0, 0.1))


def test_sessions_taking_turns_equal_sessions_one_after_the_other(fresh_bench, tools):
    settings = [{"dp": {"max_grad_norm": 0.1}}, {"lora": {"dropout": 0.3}}, {"lora": {"target_modules": ["o_proj"]}}]
    alone = []
    for one in settings:
        session = fresh_bench.open(**one)
        alone.append([tools.run_pass(session, tools.batch(seed=s), seed=s).contribution.digest() for s in range(3)])
        session.close()
    together = [fresh_bench.open(**one) for one in settings]
    digests = [[], [], []]
    for s in range(3):
        for i, session in enumerate(together):
            digests[i].append(tools.run_pass(session, tools.batch(seed=s), seed=s).contribution.digest())
    # A private session's dropout key is its own, but it has no dropout here.
    assert digests == alone


def test_weights_that_are_nan_give_clear_errors_and_the_session_recovers(fresh_bench, tools):
    session = fresh_bench.open()
    saved = session.export_state(optimizer=True)
    poison_weights(session, tools)
    with pytest.raises(TGTinkerError, match="not finite") as passed:
        tools.run_pass(session, tools.batch())
    assert passed.value.field == "batch"
    sampler = begin_sample(session, [1, 2])
    (error,) = [p.error for p in [*sampler.step(), *sampler.step()] if p.error is not None]
    assert "diverged" in error.message
    assert error.field == "weights"
    assert sampler.idle
    session.import_state(saved, optimizer=True)
    assert np.isfinite(tools.accumulate(session, tools.batch()).loss)
    tools.step(session)


def test_the_loss_equals_transformers_own_on_equal_lengths(fresh_bench, tools):
    session = fresh_bench.open()
    batch = tools.batch(4, masked_prompt=True)
    before = tools.weights_of(session)
    found = tools.run_pass(session, batch).loss
    assert tools.weights_of(session) == before
    with torch.no_grad(), session.base.computing(session.adapter):
        expected = session.base.module(
            input_ids=torch.from_numpy(batch.input_ids),
            attention_mask=torch.from_numpy(batch.attention_mask),
            labels=torch.from_numpy(batch.labels),
        ).loss
    assert found == pytest.approx(float(expected), abs=1e-4)


def test_a_batch_of_none_in_eval_is_refused_too(fresh_bench):
    session = fresh_bench.open()
    with pytest.raises(TGTinkerError):
        session.forward_backward(PassRequest.of_batch(BatchData(input_ids=[]), train=False))


@pytest.mark.parametrize("leaver", [0, 1, 2])
@pytest.mark.parametrize("settings", [{}, {"dp": {"max_grad_norm": 0.1}}, {"gradient_checkpointing": True}], ids=str)
def test_a_run_that_leaves_takes_nobody_s_gradient_with_it(fresh_bench, tools, settings, leaver):
    """PEFT freezes all adapters but one when it deletes one."""
    sessions = [fresh_bench.open(**settings) for _ in range(3)]
    gone = sessions.pop(leaver)
    before = [tools.run_pass(s, tools.batch(2)).contribution.sum_P for s in sessions]
    gone.close()
    for session, expected in zip(sessions, before, strict=True):
        assert expected.any()
        np.testing.assert_array_equal(tools.run_pass(session, tools.batch(2)).contribution.sum_P, expected)

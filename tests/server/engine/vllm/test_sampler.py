"""Requests through the whole sampler, with a worker that computes a bigram of sixteen tokens."""

import contextlib
import os
import signal
import time

import numpy as np
import pytest

from tests.server.engine.vllm import conftest
from tests.server.engine.vllm.toy_worker import SIZE, log_softmax, next_logits
from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker.types.tokens import PromptFigures
from tg_tinker_server.engine.sampling.token_sampler import BatchedSampler
from tg_tinker_server.engine.vllm import patience, sampler
from tg_tinker_server.engine.vllm.patience import MOST_ENDS
from tg_tinker_server.engine.vllm.requests import Request
from tg_tinker_server.engine.vllm.settings import MEMORY_FOLDER

GREEDY = {"temperature": 0, "max_tokens": 5}
KILLED, REFUSED, SLOW = 2000, 2001, 2002


def lift_of(session):
    """What the toy worker makes of the adapter of a session, computed from the session's own numbers."""
    return conftest.lift_of(session.export_state(optimizer=False).tensors)


def expected_greedy(prompt, length, lift=0.0):
    tokens, logprobs, last = [], [], prompt[-1] % SIZE
    for _ in range(length):
        found = log_softmax(next_logits(last, lift))
        last = int(np.argmax(found))
        tokens.append(last)
        logprobs.append(found[last])
    return tokens, logprobs


def check(response, prompt, length, lift=0.0):
    tokens, logprobs = expected_greedy(prompt, length, lift)
    assert response.sequences[0].tokens == tokens
    np.testing.assert_allclose(response.sequences[0].logprobs, logprobs, rtol=1e-5, atol=1e-5)


def pid_of(routed):
    return next(iter(routed.sampler._workers.values())).pid


def state_of(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def is_alive(pid):
    try:
        return state_of(pid) != "Z"
    except OSError:
        return False


def stop(pid):
    """Stop all of its threads: it stops one after the other."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: state_of(pid) == "T")


def wait_until(holds, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def told_of_its_end(routed):
    """Until the worker's end lies in its inbox, read by nobody."""
    process = next(iter(routed.sampler._workers.values()))._process
    wait_until(lambda: not process._inbox.empty())


def stepped(routed, holds):
    """Steps until something holds."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "it never happened"
        routed.step()


def folders():
    return [name for name in os.listdir(MEMORY_FOLDER) if name.startswith(f"tg-tinker-adapter-{os.getpid()}-")]


def test_a_base_model_is_sampled_by_the_worker(routed):
    response = routed.one(routed.base(), [3, 9], params=GREEDY)
    check(response, [3, 9], 5)
    assert response.sequences[0].stop_reason == "length"
    assert routed.sampler.idle


def test_every_sequence_of_a_request_comes_with_its_alternatives(routed):
    response = routed.one(routed.base(), [3, 9], params=GREEDY, topk_sample_logprobs=3, num_samples=3)
    assert len(response.sequences) == 3
    for sequence in response.sequences:
        found = log_softmax(next_logits(9, 0.0))
        assert sequence.topk_logprobs.logprobs[0].tolist() == pytest.approx(sorted(found, reverse=True)[:3])
        assert sequence.tokens == expected_greedy([9], 5)[0]


def test_weights_of_two_runs_and_of_the_base_do_not_see_each_other(routed):
    (one, frozen), (two, _) = routed.run(seed=3, scale=0.4), routed.run(seed=4, scale=0.4)
    lifts = [lift_of(one), lift_of(two), 0.0]
    assert len({expected_greedy([3], 5, lift)[1][0] for lift in lifts}) == 3
    tickets = [
        routed.submit(weights, [3], params=GREEDY)
        for weights in (one.live_weights(), two.live_weights(), routed.base(), frozen)
    ]
    results = routed.results()
    for ticket, lift in zip(tickets, [*lifts, lifts[0]], strict=True):
        check(results[ticket], [3], 5, lift)
    assert folders() == []


def test_a_run_is_sampled_as_it_is_when_the_request_begins(routed):
    session, _ = routed.run(seed=3, scale=0.4)
    weights, before = session.live_weights(), lift_of(session)
    check(routed.one(weights, [3], params=GREEDY), [3], 5, before)
    ticket = routed.submit(weights, [SLOW, 3], params=GREEDY | {"max_tokens": 100})
    stepped(routed, lambda: ticket in routed.events)
    state = session.export_state(optimizer=False)
    session.import_state(
        type(state)(tensors={k: -v for k, v in state.tensors.items()}, scalars=state.scalars), optimizer=False
    )
    after = lift_of(session)
    assert after != before
    late = routed.submit(weights, [3], params=GREEDY)
    results = routed.results()
    check(results[ticket], [SLOW, 3], 100, before)
    check(results[late], [3], 5, after)
    assert len(next(iter(routed.sampler._workers.values()))._adapters._held) == 1  # the older one is let go


def test_weights_that_rest_begin_nothing(routed):
    session, _ = routed.run()
    weights, other = session.live_weights(), routed.base()
    routed.one(other, [1], params=GREEDY)
    ticket, ahead = routed.submit(weights, [3], params=GREEDY), routed.submit(other, [3], params=GREEDY)
    told = []
    while not any(p.ticket is ahead and isinstance(p.events[-1], PromptFigures) for p in told):
        told += routed.sampler.step({weights})
    assert not any(p.ticket is ticket for p in told)
    assert ticket.held is None
    check(routed.results()[ticket], [3], 5, lift_of(session))


def test_a_closed_run_fails_its_requests_and_no_other(routed):
    (session, _), other = routed.run(), routed.base()
    mine = routed.submit(session.live_weights(), [SLOW], params=GREEDY | {"max_tokens": 400})
    stepped(routed, lambda: mine in routed.events)
    session.close()
    theirs = routed.submit(other, [3], params=GREEDY)
    results = routed.results()
    assert isinstance(results[mine], ServerError)
    assert "closed" in str(results[mine])
    check(results[theirs], [3], 5)
    assert not next(iter(routed.sampler._workers.values()))._adapters._held


def test_a_request_that_vllm_refuses_fails_alone(routed):
    weights = routed.base()
    bad, good = routed.submit(weights, [REFUSED], params=GREEDY), routed.submit(weights, [3], params=GREEDY)
    results = routed.results()
    assert "refused the request" in str(results[bad])
    check(results[good], [3], 5)


@pytest.mark.parametrize("prompt", [[], [-1], [2048], [1] * 513])
def test_bad_prompts_are_refused_before_anything_starts(routed, prompt):
    with pytest.raises(InvalidRequestError):
        routed.submit(routed.base(), prompt)
    assert not routed.sampler._workers


def test_equal_seeds_choose_equally_and_samples_differ(routed):
    weights, params = routed.base(), {"max_tokens": 20, "seed": 5}
    first, second = (
        [s.tokens for s in routed.one(weights, [3], params=params, num_samples=3).sequences] for _ in (0, 1)
    )
    assert first == second
    assert len({tuple(tokens) for tokens in first}) == 3


def test_a_stop_text_ends_a_sequence_within_the_worker_too(routed):
    weights = routed.base()
    found = [(start, expected_greedy([start], 2)[0]) for start in range(SIZE)]
    start, tokens = next(f for f in found if weights.decode(f[1][1:]) and f[1][0] != f[1][1])
    stop = weights.decode(tokens[1:])
    response = routed.one(weights, [SLOW, start], params={"temperature": 0, "max_tokens": 400, "stop": [stop]})
    assert response.sequences[0].tokens == tokens[:2]
    assert response.sequences[0].stop_reason == "stop"
    # The toy tells how many salts are in one run: the first sequence is no longer in it.
    assert routed.one(weights, [3], group="another", params=GREEDY).prompt_cache_hit_tokens == 1


def test_cancelled_requests_stop_and_leave_the_others(routed):
    weights = routed.base()
    long, other = (routed.submit(weights, [SLOW, t], params=GREEDY | {"max_tokens": 400}) for t in (3, 4))
    stepped(routed, lambda: long in routed.events)
    routed.sampler.cancel(long)
    so_far = len(routed.events.pop(long))
    assert so_far < 400
    results = routed.results()
    assert long not in results
    check(results[other], [SLOW, 4], 400)
    routed.sampler.cancel(other)  # one that ended already
    waiting = routed.submit(weights, [3], params=GREEDY)
    routed.sampler.cancel(waiting)
    assert routed.sampler.idle


def test_groups_are_never_computed_together_and_none_waits_for_later_ones(routed):
    weights = routed.base()
    tickets = [
        routed.submit(weights, [SLOW, 3], group=group, params=GREEDY | {"max_tokens": 8}, num_samples=2)
        for group in ("a", "a", "b", "a", "c", "b")
    ]
    ends = []
    while not routed.sampler.idle:
        for progress in routed.sampler.step():
            assert progress.error is None
            if isinstance(progress.events[-1], PromptFigures):
                ends.append(tickets.index(progress.ticket))
                # The toy tells how many salts were in one run, and each group has one of its own.
                assert progress.events[-1].prompt_cache_hit_tokens == 1
    assert sorted(ends[:2]) == [0, 1]
    assert ends[2:] == [2, 3, 4, 5]


def test_a_killed_worker_fails_what_it_had_and_the_next_request_starts_another(routed):
    weights = routed.run()[1]
    killed, beside = (routed.submit(weights, [t, 3], params=GREEDY | {"max_tokens": 50}) for t in (KILLED, SLOW))
    results = routed.results()
    for ticket in (killed, beside):
        assert isinstance(results[ticket], ServerError)
        assert "ended while it worked on the request" in str(results[ticket])
        assert results[ticket].details["retry"] is True
    assert routed.sampler.idle
    session = routed.closing[0]
    check(routed.one(weights, [3], params=GREEDY), [3], 5, lift_of(session))


def test_a_worker_that_ends_too_often_is_left_alone_for_a_while(routed, monkeypatch):
    weights, now = routed.base(), [0.0]
    for _ in range(MOST_ENDS):
        worker = routed.sampler._worker(weights)
        worker._patience.clock = lambda: now[0]
        with pytest.raises(ServerError, match="ended while"):
            routed.one(weights, [KILLED], params=GREEDY)
    with pytest.raises(ServerError, match=f"ended {MOST_ENDS} times within 10 minutes"):
        routed.one(weights, [3], params=GREEDY)
    now[0] = patience.ENDS_WITHIN_S
    check(routed.one(weights, [3], params=GREEDY), [3], 5)


def test_one_that_cannot_start_says_so_to_whoever_waits_and_to_the_log(routed, monkeypatch, capsys):
    monkeypatch.setenv("VLLM_TOY", "failed")
    with pytest.raises(ServerError, match="could not be started"):
        routed.one(routed.base(), [3], params=GREEDY)
    assert "no memory for the model" in capsys.readouterr().out


@pytest.mark.parametrize("mood", ["unsupported", "refusing", "ignoring", "biased"])
def test_what_vllm_turns_down_is_sampled_by_the_built_in_sampler(routed, monkeypatch, mood):
    monkeypatch.setenv("VLLM_TOY", mood)
    _, weights = routed.run(scale=0.05)
    tickets = [routed.submit(weights, [3, 700], params=GREEDY | {"max_tokens": n}) for n in (5, 400)]
    assert all(isinstance(t, Request) for t in tickets)
    stepped(routed, lambda: routed.sampler._moved)
    routed.sampler.cancel(tickets[1])
    results = routed.results()
    built_in = session_sampler(routed)
    routed.sampler, given = built_in, routed.sampler
    expected = routed.one(weights, [3, 700], params=GREEDY)
    routed.sampler = given
    assert results[tickets[0]].sequences[0].tokens == expected.sequences[0].tokens
    assert tickets[1] not in results or results[tickets[1]] is None
    assert not routed.sampler._moved
    assert not routed.sampler._owners
    if mood in ("unsupported", "biased"):
        assert not isinstance(routed.submit(weights, [3], params=GREEDY), Request)
        routed.results()


def session_sampler(routed):
    built_in = routed.sampler._built_in
    assert isinstance(built_in, BatchedSampler)
    return built_in


def test_a_request_for_the_built_in_sampler_starts_no_worker(routed):
    response = routed.one(routed.base(), [3], params={"max_tokens": 2, "top_p": 0.9})
    assert len(response.sequences[0].tokens) == 2
    assert not routed.sampler._workers


def test_a_worker_that_does_not_speak_the_protocol_is_ended(routed, monkeypatch):
    monkeypatch.setenv("VLLM_TOY", "chatter")
    ticket = routed.submit(routed.base(), [3], params=GREEDY)
    routed.step()
    pid = pid_of(routed)
    assert isinstance(routed.results()[ticket], ServerError)
    wait_until(lambda: not is_alive(pid))


def test_closing_ends_the_worker(routed):
    routed.one(routed.base(), [3], params=GREEDY)
    pid = pid_of(routed)
    assert is_alive(pid)
    routed.sampler.close()
    assert not is_alive(pid)
    assert routed.sampler.idle


def test_a_stopped_worker_holds_nobody_up(routed):
    weights = routed.base()
    routed.one(weights, [3], params=GREEDY)
    pid = pid_of(routed)
    stop(pid)
    try:
        ticket = routed.submit(weights, [5] * 500, params=GREEDY)
        for _ in range(20):  # far more than a pipe holds
            routed.sampler.submit(weights, ticket.query, group="all")
            assert routed.step() == []
        here = routed.submit(weights, [3], params={"max_tokens": 2, "top_p": 0.9})
        stepped(routed, lambda: any(isinstance(e, PromptFigures) for e in routed.events.get(here, ())))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    check(routed.results()[ticket], [5], 5)


def test_an_answer_that_cannot_be_read_fails_alone(routed, monkeypatch):
    weights, heard = routed.base(), Request.heard

    def broken(request, index, message):
        if request is bad:
            raise IndexError("a tokenizer without this token")
        return heard(request, index, message)

    monkeypatch.setattr(Request, "heard", broken)
    bad, good = (routed.submit(weights, [SLOW, t], params=GREEDY) for t in (3, 4))
    results = routed.results()
    assert isinstance(results[bad], IndexError)
    check(results[good], [SLOW, 4], 5)


def test_a_worker_that_says_nothing_for_too_long_is_ended(routed):
    weights, now = routed.base(), [0.0]
    routed.one(weights, [3], params=GREEDY)
    worker = routed.sampler._worker(weights)
    worker._patience.clock = lambda: now[0]
    now[0] = 2 * patience.SILENT_ON_CPU_S  # it was asked nothing in this time
    pid = worker.pid
    stop(pid)
    asked, other = (routed.submit(weights, [3], params=GREEDY, group=g) for g in ("a", "b"))
    for _ in range(5):
        assert routed.step() == []
    now[0] += patience.SILENT_ON_CPU_S + 1
    results = routed.results()
    assert "ended while it worked" in str(results[asked])
    check(results[other], [3], 5)  # which it was never told of
    assert not is_alive(pid)


def test_a_worker_that_died_with_nothing_to_do_costs_nobody_a_request(routed):
    weights = routed.base()
    routed.one(weights, [3], params=GREEDY)
    pid = pid_of(routed)
    os.kill(pid, signal.SIGKILL)
    told_of_its_end(routed)
    check(routed.one(weights, [3], params=GREEDY), [3], 5)
    assert pid_of(routed) != pid


def test_a_worker_that_died_while_it_started_for_nobody_costs_nobody_a_request(routed, monkeypatch):
    weights = routed.base()
    monkeypatch.setenv("VLLM_TOY", "failed")
    left = routed.submit(weights, [3], params=GREEDY)
    routed.step()
    routed.sampler.cancel(left)
    monkeypatch.delenv("VLLM_TOY")
    told_of_its_end(routed)
    check(routed.one(weights, [3], params=GREEDY), [3], 5)


def test_on_a_cpu_long_texts_are_the_built_in_samplers(routed, monkeypatch):
    monkeypatch.setattr(sampler, "MOST_POSITIONS_ON_CPU", 64)
    weights, prompt = routed.base(), [3] * 60
    assert isinstance(routed.submit(weights, prompt, params=GREEDY), Request)
    assert not isinstance(routed.submit(weights, prompt, params=GREEDY | {"max_tokens": 6}), Request)
    assert not isinstance(routed.submit(weights, prompt, params=GREEDY | {"max_tokens": None}), Request)
    routed.results()

"""Samples: begun once, told once they end, given up when nobody wants them."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.gateway.conftest import MODEL, Raw, config
from tg_tinker.errors import InvalidRequestError, RateLimitedError
from tg_tinker.types.tokens import SampledSequence, SampleQuery, SampleResponse
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.gateway import application
from tg_tinker_server.gateway import samples as samples_module
from tg_tinker_server.gateway.samples import CLONE, Samples, error_of
from tg_tinker_server.service.caller import Caller
from tg_tinker_server.service.policy import KeyPolicy

ME = Caller(tenant="t", key_id="k", scopes=frozenset({"SAMPLE"}))
OTHER = Caller(tenant="other", key_id="k", scopes=frozenset({"SAMPLE"}))
SAMPLER = "0" * 32 + ":sample:0"
QUERY = SampleQuery(prompt=(1,))


class Slow:
    """A sampler service that answers when it is told to."""

    def __init__(self) -> None:
        self.gate, self.begun, self.full = asyncio.Event(), 0, False

    async def sample(self, *_args: Any) -> SampleResponse:
        if self.full:
            raise RateLimitedError("full", retry_after=1.0)
        self.begun += 1
        await self.gate.wait()
        return SampleResponse(sequences=[SampledSequence(stop_reason="stop", tokens=[1], logprobs=[0.0])])


async def _begin(slow: Slow, samples: Samples, seq: int, body: bytes = b"x") -> str:
    return await samples.submit(ME, SAMPLER, seq, QUERY, body)


def test_a_repeated_sample_is_begun_once_and_nobody_else_finds_it() -> None:
    async def go() -> None:
        slow = Slow()
        samples = Samples(slow)  # type: ignore[arg-type]
        first, second = await _begin(slow, samples, 3), await _begin(slow, samples, 3)
        assert (first, slow.begun) == (second, 1)
        with pytest.raises(InvalidRequestError, match="different"):
            await _begin(slow, samples, 3, b"another")
        assert samples.get(OTHER, first) is None
        await samples.close()

    asyncio.run(go())


def test_a_full_queue_refuses_at_once_and_the_same_request_may_come_again() -> None:
    async def go() -> None:
        slow = Slow()
        samples = Samples(slow)  # type: ignore[arg-type]
        slow.full = True
        with pytest.raises(RateLimitedError):
            await _begin(slow, samples, 0)
        slow.full = False
        assert await _begin(slow, samples, 0)
        await samples.close()

    asyncio.run(go())


def test_what_ends_is_told_once_to_the_copy_of_the_client_that_asked() -> None:
    async def go() -> None:
        slow = Slow()
        samples = Samples(slow)  # type: ignore[arg-type]
        mine = [await _begin(slow, samples, n) for n in (0, 1)]
        copied = await _begin(slow, samples, 7 * CLONE + 1)
        waiting = asyncio.create_task(samples.ended_after(ME, (SAMPLER, 0), 0, 5.0))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        slow.gate.set()
        ended, cursor = await waiting
        while len(ended) < 2:
            ended, cursor = await samples.ended_after(ME, (SAMPLER, 0), 0, 5.0)
        assert {k.request_id for k in ended} == set(mine)
        assert await samples.ended_after(ME, (SAMPLER, 0), cursor, 0.01) == ([], cursor)
        assert (await samples.ended_after(OTHER, (SAMPLER, 0), 0, 0.01))[0] == []
        (other,), _ = await samples.ended_after(ME, (SAMPLER, 7), 0, 5.0)
        assert other.request_id == copied
        samples.forget(ME, mine)
        assert samples.get(ME, mine[0]) is None

    asyncio.run(go())


def test_a_refused_sample_is_found_failed_where_the_sample_would_have_been() -> None:
    async def go() -> None:
        slow = Slow()
        samples = Samples(slow)  # type: ignore[arg-type]
        error = InvalidRequestError("no", field="top_p", constraint="at most 1")
        request = samples.refuse(ME, SAMPLER, 4, error, b"bad")
        assert (request, request) == (f"{SAMPLER}:req:4", samples.refuse(ME, SAMPLER, 4, error, b"bad"))
        ((told,), cursor) = await samples.ended_after(ME, (SAMPLER, 0), 0, 0.0)
        assert (told.request_id, told.failed) == (request, True)
        assert await samples.ended_after(ME, (SAMPLER, 0), cursor, 0.0) == ([], cursor)
        kept = samples.get(ME, request)
        assert kept is not None
        assert error_of(kept) is error
        with pytest.raises(InvalidRequestError, match="no"):  # the number is another request's
            samples.refuse(ME, SAMPLER, 4, error, b"other")

    asyncio.run(go())


def test_what_was_fetched_is_not_kept_in_the_list_of_what_ended() -> None:
    async def go() -> None:
        slow = Slow()
        slow.gate.set()
        samples = Samples(slow)  # type: ignore[arg-type]
        ids = [await _begin(slow, samples, n) for n in range(3)]
        await asyncio.sleep(0.01)
        kept = weakref.ref(samples.get(ME, ids[0]).task)  # type: ignore[union-attr]
        samples.forget(ME, ids[:2])
        told, _ = await samples.ended_after(ME, (SAMPLER, 0), 0, 0.0)
        assert [e.request_id for e in told] == ids[2:]
        gc.collect()
        assert kept() is None
        samples.forget(ME, ids)
        assert (samples._kept, samples._feeds) == ({}, {})

    asyncio.run(go())


def test_a_cursor_of_the_process_before_is_refused_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        slow = Slow()
        slow.gate.set()
        monkeypatch.setattr(samples_module.time, "time", lambda: 1.7e9)
        _, before = await Samples(slow).ended_after(ME, (SAMPLER, 0), 0, 0.0)  # type: ignore[arg-type]
        monkeypatch.setattr(samples_module.time, "time", lambda: 1.7e9 + 2)
        samples = Samples(slow)  # type: ignore[arg-type]
        request = await _begin(slow, samples, 0)
        await asyncio.sleep(0.01)
        for cursor in (1, before):
            with pytest.raises(InvalidRequestError, match="restarted"):
                await samples.ended_after(ME, (SAMPLER, 0), cursor, 0.0)
        ((told,), _) = await samples.ended_after(ME, (SAMPLER, 0), 0, 0.0)
        assert told.request_id == request

    asyncio.run(go())


def test_a_key_with_a_policy_sees_only_what_it_drew_itself() -> None:
    async def go() -> None:
        policy = KeyPolicy(dataset_id="d", target_epsilon=1.0, target_delta=1e-6)
        bound = Caller(tenant="t", key_id="bound", scopes=ME.scopes, policy=policy)
        slow = Slow()
        slow.gate.set()
        samples = Samples(slow)  # type: ignore[arg-type]
        theirs = await _begin(slow, samples, 0)
        await asyncio.sleep(0.01)
        assert samples.get(bound, theirs) is None
        samples.forget(bound, [theirs])
        samples.cancel(bound, theirs)
        assert samples.get(ME, theirs) is not None
        mine = await samples.submit(bound, SAMPLER, 1, QUERY, b"x")
        assert samples.get(bound, mine) is not None
        await samples.close()

    asyncio.run(go())


def test_a_cancelled_sample_fails_and_a_session_that_is_over_frees_everything() -> None:
    async def go() -> None:
        slow = Slow()
        samples = Samples(slow)  # type: ignore[arg-type]
        request = await _begin(slow, samples, 0)
        samples.cancel(OTHER, request)
        await asyncio.sleep(0.01)
        kept = samples.get(ME, request)
        assert kept is not None
        assert not kept.task.done()
        samples.cancel(ME, request)
        await asyncio.wait({kept.task})
        assert isinstance(error_of(kept), InvalidRequestError)
        await _begin(slow, samples, 1)
        samples.forget_session("t", SAMPLER.split(":", maxsplit=1)[0])
        assert samples.get(ME, request) is None

    asyncio.run(go())


def test_samples_of_clients_that_are_gone_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        clock = [1000.0]
        monkeypatch.setattr(samples_module.time, "monotonic", lambda: clock[0])
        slow = Slow()
        samples = Samples(slow)  # type: ignore[arg-type]
        gone, there = await _begin(slow, samples, 0), "1" * 32
        other = await samples.submit(ME, f"{there}:sample:0", 0, QUERY, b"x")
        kept = samples._kept["t", gone].task
        clock[0] += samples_module.SILENT_S - 1
        samples.seen("t", there)  # a heartbeat
        samples.forget_silent()
        assert ("t", gone) in samples._kept
        clock[0] += 2
        samples.forget_silent()
        assert list(samples._kept) == [("t", other)]
        await asyncio.wait({kept})
        assert kept.cancelled()
        await samples.close()

    asyncio.run(go())


def test_the_server_stops_samples_of_sessions_without_a_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples_module, "SILENT_S", 2.0)
    monkeypatch.setattr(application, "SWEEP_S", 0.1)
    with EmbeddedServer(config(tmp_path)) as server:
        client = Raw(server.tinker_url, server.mint_key()).open()
        request = _asked(client)
        for _ in range(12):
            client.ok("session_heartbeat", {"session_id": client.session})
            time.sleep(0.25)
        assert isinstance(client.retrieve(request, proto=True), bytes)
        time.sleep(4.0)
        assert client.post("retrieve_future", {"request_id": request}).status_code == 410
        client.ok("session_heartbeat", {"session_id": client.session})  # it may come back
        assert isinstance(client.retrieve(_asked(client), proto=True), bytes)


def _asked(client: Raw) -> str:
    body = {"session_id": client.session, "sampling_session_seq_id": 0, "base_model": MODEL}
    sampler = client.ok("create_sampling_session", body)["sampling_session_id"]
    prompt = {"chunks": [{"tokens": [1, 2], "type": "encoded_text"}]}
    asked = {"sampling_session_id": sampler, "seq_id": 0, "prompt": prompt, "sampling_params": {"max_tokens": 2}}
    return str(client.ok("asample", asked)["request_id"])


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        monkeypatch.setattr(samples_module, "MOST_KEPT", 3)
        slow = Slow()
        slow.gate.set()
        samples = Samples(slow)  # type: ignore[arg-type]
        ids = []
        for seq in range(10):
            ids.append(await _begin(slow, samples, seq))
            await asyncio.sleep(0.005)
        assert [samples.get(ME, i) is not None for i in ids[-3:]] == [True] * 3
        assert sum(samples.get(ME, i) is not None for i in ids) <= 4

    asyncio.run(go())


def test_samples_are_polled_together_and_cancelled_over_http(client: Raw) -> None:
    body = {"session_id": client.session, "sampling_session_seq_id": 0, "base_model": MODEL}
    sampler = client.ok("create_sampling_session", body)["sampling_session_id"]
    assert client.ok("create_sampling_session", body)["sampling_session_id"] == sampler
    prompt = {"chunks": [{"tokens": [1, 2], "type": "encoded_text"}]}
    ids = set()
    for seq in range(3):
        params = {"max_tokens": 2, "stop": []}
        asked = {"sampling_session_id": sampler, "seq_id": seq, "prompt": prompt, "sampling_params": params}
        ids.add(client.ok("asample", asked)["request_id"])
    found: set[str] = set()
    cursor = 0
    while found != ids:
        target = {"type": "sampling_session", "sampling_session_id": sampler, "cloned_sampler_id": 0}
        answer = client.ok("retrieve_futures", {"target": target, "prev_cursor": cursor, "timeout": 5})
        found |= {c["request_id"] for c in answer["completions"] if c["state"] == "finished"}
        cursor = answer["cursor"]
    for request in ids:
        assert isinstance(client.retrieve(request, proto=True), bytes)
    assert client.post("cancel_future", {"request_id": ids.pop()}).status_code == 204
    assert client.post(f"sessions/{client.session}/finish", {"reason": {"type": "success"}}).status_code == 204
    assert client.post("retrieve_future", {"request_id": ids.pop()}).status_code == 410
    assert client.post("session_heartbeat", {"session_id": client.session}).status_code == 410


def test_a_sampler_that_does_not_exist_is_not_listened_to(client: Raw) -> None:
    target = {"type": "sampling_session", "sampling_session_id": "nothing", "cloned_sampler_id": 0}
    assert client.post("retrieve_futures", {"target": target, "timeout": 0}).status_code == 404


def test_a_key_with_a_policy_does_not_listen_to_samplers_of_other_sessions(
    server: EmbeddedServer, client: Raw
) -> None:
    body = {"session_id": client.session, "sampling_session_seq_id": 0, "base_model": MODEL}
    sampler = client.ok("create_sampling_session", body)["sampling_session_id"]
    asked = {
        "sampling_session_id": sampler,
        "seq_id": 0,
        "prompt": {"chunks": [{"tokens": [1, 2], "type": "encoded_text"}]},
        "sampling_params": {"max_tokens": 2, "stop": []},
        "prompt_logprobs": True,
    }
    request = client.ok("asample", asked)["request_id"]
    client.retrieve(request, proto=True)
    policy = KeyPolicy(dataset_id="d", target_epsilon=1.0, target_delta=1e-6)
    with httpx.Client(timeout=120) as http:
        bound = Raw(server.tinker_url, server.mint_key(policy=policy), http=http)
        assert bound.post("retrieve_future", {"request_id": request}).status_code == 410  # as one that never was
        target = {"type": "sampling_session", "sampling_session_id": sampler, "cloned_sampler_id": 0}
        answer = bound.post("retrieve_futures", {"target": target, "timeout": 0, "retrieved_request_ids": [request]})
        assert answer.status_code == 404
        assert bound.post("asample", {**asked, "seq_id": 1}).status_code == 404
        bound.post("cancel_future", {"request_id": request})
    assert isinstance(client.retrieve(request, proto=True), bytes)

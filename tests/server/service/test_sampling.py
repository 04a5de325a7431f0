"""Text from runs on a real server: weights not settled rest, who leaves frees its rows, who shares a batch."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.server.rpc.raw_client import RawClient, as_error, batch
from tg_tinker.errors import InvalidRequestError, ResourceNotFoundError, ServerError
from tg_tinker.proto.v1 import runs_pb2, sampling_pb2
from tg_tinker.types import DPConfig, TrainingConfig
from tg_tinker.types.sampling import GenerationOptions
from tg_tinker.types.tokens import SampleQuery, SamplingParams, response_of
from tg_tinker.wire.call_messages import call_to_proto, sampling_to_proto
from tg_tinker.wire.calls import Call, Generate, Position, Step
from tg_tinker.wire.methods import method_of
from tg_tinker.wire.operations import cancel_future_request
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.service.run import BROKEN, Run

CONFIG = TrainingConfig(model_ref="bigram", batch_size=4, seed=1)
DP = DPConfig(noise_multiplier=1.0, target_epsilon=1e4)


@pytest.fixture
def client(bigram_server: EmbeddedServer) -> RawClient:
    return RawClient(bigram_server.address, bigram_server.mint_key("tenant-a"))


def ask(*prompts: str, completions: int = 1, **options: Any) -> Generate:
    params = GenerationOptions(**({"max_tokens": 8, "seed": 1} | options))
    return Generate(prompts=prompts or ("ab",), params=params, num_completions=completions)


def endless(**options: Any) -> Generate:
    """A completion that takes longer than any test."""
    return ask("ab" * 4, completions=400, **({"max_tokens": 3900, "temperature": 0.0} | options))


def stream_of(client: RawClient, run_id: str, options: GenerationOptions) -> Any:
    request = sampling_pb2.SampleStreamRequest(
        run_id=run_id, prompt="ab", params=sampling_to_proto(options, num_completions=1)
    )
    method = method_of(type(request))
    return client.channel.unary_stream(method.path)(request.SerializeToString(), metadata=client.metadata)


def long_stream(client: RawClient, run_id: str) -> Any:
    """A stream that takes seconds: greedy, so that it runs in a circle."""
    return stream_of(client, run_id, GenerationOptions(max_tokens=4000, temperature=0.0))


def loop_of(server: EmbeddedServer) -> Any:
    assert server._server is not None
    return server._server._sampling


def run_of(server: EmbeddedServer, run_id: str) -> Run:
    assert server._server is not None
    return server._server._registry.resident._runs[("tenant-a", run_id)]


@contextmanager
def unsettled(server: EmbeddedServer, run_id: str) -> Iterator[None]:
    """As long as a step that is not durable yet."""
    lock = run_of(server, run_id).weights
    asyncio.run_coroutine_threadsafe(lock.acquire(), server._loop).result(10)
    try:
        yield
    finally:
        server._loop.call_soon_threadsafe(lock.release)


def noted_cancels(server: EmbeddedServer) -> list[Any]:
    """Requests that are taken out of the sampler from now on, before their end."""
    sampler, noted = loop_of(server)._sampler, []
    cancel = sampler.cancel
    sampler.cancel = lambda ticket: (noted.append(ticket.over), cancel(ticket))[1]
    return noted


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


def completions(state: Any) -> list[str]:
    assert state.status == "completed", state.error
    return [s.completion for s in state.result.samples]


def submit(client: RawClient, run_id: str, seq: int, call: Call) -> None:
    client.send(call_to_proto(call, Position(run_id=run_id, seq=seq)))


def test_weights_that_are_not_settled_rest_and_others_are_sampled(
    bigram_server: EmbeddedServer, client: RawClient
) -> None:
    run, other = client.create(CONFIG), client.create(CONFIG)
    expected = completions(client.call(run.run_id, 1, ask("ab", "c", completions=2)))
    sampling = loop_of(bigram_server)
    turns: list[set[Any]] = []
    turn = sampling._turn
    sampling._turn = lambda inbox, leaving, resting: (turns.append(resting), turn(inbox, leaving, resting))[1]
    with unsettled(bigram_server, run.run_id):
        submit(client, run.run_id, 2, ask("ab", "c", completions=2))
        assert completions(client.call(other.run_id, 1, ask())) == completions(client.call(other.run_id, 2, ask()))
        mine = run_of(bigram_server, run.run_id).session.live_weights()
        assert turns
        assert all(mine in resting for resting in turns[1:])
        count = len(turns)
        time.sleep(0.2)
        assert len(turns) == count, "it waits without turns"
        assert run_of(bigram_server, run.run_id).lane.get(2).status == "running"
    assert completions(client.wait(run.run_id, 2)) == expected


def test_a_request_that_meets_only_unsettled_weights_waits(bigram_server: EmbeddedServer, client: RawClient) -> None:
    run = client.create(CONFIG)
    expected = completions(client.call(run.run_id, 1, ask()))
    with unsettled(bigram_server, run.run_id):
        submit(client, run.run_id, 2, ask())
        submit(client, run.run_id, 3, ask())
        time.sleep(0.1)
        client.send(cancel_future_request(Position(run_id=run.run_id, seq=2)))  # leaves while all rest
        wait_until(lambda: run_of(bigram_server, run.run_id).lane.get(3).status == "running")
    assert client.wait(run.run_id, 2).status == "cancelled"
    assert completions(client.wait(run.run_id, 3)) == expected


def test_a_stream_goes_on_over_steps_with_settled_weights(bigram_server: EmbeddedServer, client: RawClient) -> None:
    run = client.create(CONFIG)
    stream = long_stream(client, run.run_id)
    next(stream)
    for seq in (1, 3, 5):
        assert client.call(run.run_id, seq, batch(seed=seq)).status == "completed"
        assert client.call(run.run_id, seq + 1, Step()).status == "completed"
        assert next(stream)
    stream.cancel()
    wait_until(lambda: loop_of(bigram_server)._worker is None)


def test_hanging_up_a_stream_frees_its_row(bigram_server: EmbeddedServer, client: RawClient) -> None:
    run = client.create(CONFIG)
    stream = long_stream(client, run.run_id)
    next(stream)
    assert loop_of(bigram_server)._live
    cancels = noted_cancels(bigram_server)
    stream.cancel()
    wait_until(lambda: loop_of(bigram_server)._worker is None)
    assert cancels == [False]
    assert loop_of(bigram_server)._live == {}
    assert loop_of(bigram_server)._sampler.idle


def test_a_cancelled_sample_frees_its_rows_and_the_lane_goes_on(
    bigram_server: EmbeddedServer, client: RawClient
) -> None:
    run = client.create(CONFIG)
    submit(client, run.run_id, 1, endless())
    wait_until(lambda: bool(loop_of(bigram_server)._live))
    cancels = noted_cancels(bigram_server)
    client.send(cancel_future_request(Position(run_id=run.run_id, seq=1)))
    assert client.wait(run.run_id, 1).status == "cancelled"
    assert completions(client.call(run.run_id, 2, ask()))
    wait_until(lambda: loop_of(bigram_server)._worker is None)
    assert cancels == [False]
    assert loop_of(bigram_server)._sampler.idle


@pytest.mark.parametrize(
    "ending", [runs_pb2.UnloadModelRequest, runs_pb2.DeleteTrainingClientRequest], ids=["unload", "delete"]
)
def test_a_stream_of_a_run_that_is_put_away_ends_and_others_go_on(
    bigram_server: EmbeddedServer, client: RawClient, ending: Any
) -> None:
    run, other = client.create(CONFIG), client.create(CONFIG)
    stream, beside = long_stream(client, run.run_id), long_stream(client, other.run_id)
    next(stream)
    next(beside)
    client.send(ending(run_id=run.run_id))
    with pytest.raises(grpc.RpcError) as caught:
        for _ in stream:
            pass
    error = as_error(caught.value)
    assert isinstance(error, ServerError)
    assert "closed" in error.message
    assert next(beside)
    assert completions(client.call(other.run_id, 1, ask()))
    beside.cancel()
    wait_until(lambda: loop_of(bigram_server)._worker is None)


def test_weights_that_could_not_be_taken_back_are_shown_no_further(
    bigram_server: EmbeddedServer, client: RawClient
) -> None:
    run = client.create(CONFIG)
    stream = long_stream(client, run.run_id)
    next(stream)
    run_of(bigram_server, run.run_id).status = BROKEN
    with pytest.raises(grpc.RpcError) as caught:
        for _ in stream:
            pass
    assert "half-way" in as_error(caught.value).message
    assert client.call(run.run_id, 1, ask()).status == "failed"


def test_a_prompt_without_room_fails_the_whole_request_by_name(client: RawClient) -> None:
    run = client.create(CONFIG)
    state = client.call(run.run_id, 1, ask("fine", "x" * 4096))
    assert isinstance(state.error, InvalidRequestError)
    assert state.error.field == "prompts"
    stranger = sampling_pb2.SampleStreamRequest(run_id="run_nobody", prompt="x")
    stranger.params.CopyFrom(sampling_to_proto(GenerationOptions(), num_completions=1))
    with pytest.raises(ResourceNotFoundError):
        client.send(stranger)


@pytest.mark.parametrize(
    ("share", "together"),
    [("tenant", {(1, 0), (3, 2)}), ("everyone", {(1, 0), (3, 2), (5, 0), (5, 1)}), ("off", set())],
)
def test_who_shares_a_batch(tmp_path: Path, share: Any, together: set[tuple[int, int]]) -> None:
    """Runs that may share a pass; and the prompts of one request, whoever asks."""
    exact = DPConfig(target_epsilon=None, noise_multiplier=1.0, allow_unnoised_steps=True)
    configs = [CONFIG.model_copy(update={"dp_config": dp}) for dp in (None, None, DP, DP, exact)]
    config = ServerConfig(port=0, backend="bigram", data_dir=tmp_path / "data", share_passes=share)
    with EmbeddedServer(config) as server:
        mine, foreign = (RawClient(server.address, server.mint_key(tenant)) for tenant in ("tenant-a", "tenant-b"))
        runs = [(mine, mine.create(c)) for c in configs] + [(foreign, foreign.create(CONFIG))]
        sampling, groups = loop_of(server), []
        slices = sampling.slices

        def noting(weights: Any, queries: Any, group: Any, **options: Any) -> Any:
            assert len(queries) == 2
            groups.append(group)
            return slices(weights, queries, group, **options)

        sampling.slices = noting
        for caller, run in runs:
            assert len(completions(caller.call(run.run_id, 1, ask("a", "b")))) == 2
    assert {(i, j) for i in range(6) for j in range(i) if groups[i] == groups[j]} == together


def test_who_comes_while_a_broken_sampler_is_closed_is_answered_by_the_next(
    bigram_server: EmbeddedServer, client: RawClient
) -> None:
    run = client.create(CONFIG)
    client.call(run.run_id, 1, ask())
    sampling, closing, go_on = loop_of(bigram_server), threading.Event(), threading.Event()
    broken, weights = sampling._sampler, run_of(bigram_server, run.run_id).session.live_weights()

    async def sampled() -> list[Any]:
        query = SampleQuery(prompt=(1,), params=SamplingParams(max_tokens=3, stop=()))
        return [event async for slice_ in sampling.slices(weights, [query], "all") for event in slice_]

    def step(_resting: Any) -> list[Any]:
        raise IndexError("broken")

    def close() -> None:
        closing.set()
        assert go_on.wait(60)

    broken.step, broken.close = step, close
    first = asyncio.run_coroutine_threadsafe(sampled(), bigram_server._loop)
    assert closing.wait(60)
    second = asyncio.run_coroutine_threadsafe(sampled(), bigram_server._loop)
    wait_until(lambda: bool(sampling._inbox))
    go_on.set()
    with pytest.raises(ServerError, match="failed inside the server"):
        first.result(60)
    assert len(response_of(second.result(60)).sequences[0].tokens) == 3
    assert sampling._sampler is not broken


def test_who_comes_in_the_slice_in_which_the_sampler_breaks_hears_of_it(
    bigram_server: EmbeddedServer, client: RawClient
) -> None:
    run = client.create(CONFIG)
    client.call(run.run_id, 1, ask())
    sampling = loop_of(bigram_server)
    weights = run_of(bigram_server, run.run_id).session.live_weights()

    def cancel(_ticket: Any) -> None:
        raise IndexError("broken")

    async def go() -> None:
        slices = sampling.slices(weights, [SampleQuery(prompt=(1,), params=SamplingParams(max_tokens=3000))], "all")
        await anext(slices)
        sampling._sampler.cancel = cancel
        await slices.aclose()  # it leaves, and another comes before the next slice
        late = sampling.slices(weights, [SampleQuery(prompt=(1,), params=SamplingParams(max_tokens=3))], "all")
        with pytest.raises(ServerError, match="failed inside the server"):
            async with asyncio.timeout(30):
                await anext(late)  # no task of its own, which would come a slice later

    asyncio.run_coroutine_threadsafe(go(), bigram_server._loop).result(120)

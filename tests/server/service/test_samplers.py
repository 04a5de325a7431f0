"""Samplers on a real server: names that last, weights that do not change, requests that share the model."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest

from tests.server.rpc.raw_client import RawClient, as_error, batch
from tg_tinker.errors import InvalidRequestError, RateLimitedError, ResourceNotFoundError
from tg_tinker.proto.v1 import artifacts_pb2, sampling_pb2
from tg_tinker.types import TrainingConfig
from tg_tinker.types.sampling import GenerationOptions
from tg_tinker.types.tokens import SampleQuery, SamplingParams, response_of
from tg_tinker.wire.calls import Generate, Save, Step
from tg_tinker.wire.methods import method_of
from tg_tinker.wire.tokens import events_from_proto, query_to_proto
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.service import samplers as module
from tg_tinker_server.service.policy import KeyPolicy

CONFIG = TrainingConfig(model_ref="bigram", batch_size=4, seed=1)
LONG = SampleQuery(prompt=(65,), params=SamplingParams(max_tokens=4000, stop=[], seed=1))


@pytest.fixture
def client(bigram_server: EmbeddedServer) -> RawClient:
    return RawClient(bigram_server.address, bigram_server.mint_key("tenant-a"))


def query(prompt="ab", **params):
    options = {k: params.pop(k) for k in ("num_samples", "prompt_logprobs") if k in params}
    return SampleQuery(
        prompt=tuple(prompt.encode()), params=SamplingParams(**({"max_tokens": 8, "stop": []} | params)), **options
    )


def sample(client: RawClient, sampler_id: str, asked: SampleQuery):
    replies = client.send(query_to_proto(asked, sampler_id=sampler_id))
    return response_of([event for reply in replies for event in events_from_proto(reply)])


def create(client: RawClient, **fields: str):
    return client.send(sampling_pb2.CreateSamplerRequest(**fields))


def saved(client: RawClient, run_id: str, seq: int, **options):
    """Train a step with a large batch of one text, and save what a sampler needs."""
    assert client.call(run_id, seq, batch(seed=seq)).status == "completed"
    assert client.call(run_id, seq + 1, Step()).status == "completed"
    state = client.call(run_id, seq + 2, Save(kind="sampler", **options))
    assert state.status == "completed", state.error
    return state.result


def service(server: EmbeddedServer) -> module.SamplerService:
    assert server._server is not None
    return server._server._samplers


def wait_until(condition) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


def test_saved_weights_are_sampled_as_the_run_samples_and_do_not_follow_its_training(client: RawClient) -> None:
    run = client.create(
        CONFIG.model_copy(update={"optimizer": CONFIG.optimizer.model_copy(update={"learning_rate": 0.5})})
    )
    result = saved(client, run.run_id, 1, name="first")
    sampler = create(client, path=result.path)
    assert (sampler.base_model, sampler.path) == ("bigram", result.path)
    greedy = Generate(prompts=("ab",), params=GenerationOptions(max_tokens=8, temperature=0.0))
    text = client.call(run.run_id, 4, greedy).result.samples[0].completion
    frozen = sample(client, sampler.sampler_id, query(temperature=0.0, stop=None))
    [decoded] = client.send(
        sampling_pb2.DecodeRequest(sampler_id=sampler.sampler_id, ids=[{"ids": frozen.sequences[0].tokens}])
    ).texts
    assert decoded == text
    for seq in (5, 7, 9):
        client.call(run.run_id, seq, batch(seed=seq))
        client.call(run.run_id, seq + 1, Step())
    again = sample(client, sampler.sampler_id, query(temperature=0.0, stop=None))
    assert again.sequences == frozen.sequences
    base = create(client, base_model="bigram")
    assert sample(client, base.sampler_id, query(temperature=0.0)).sequences != frozen.sequences
    by_id = create(client, path=result.artifact_id)
    assert sample(client, by_id.sampler_id, query(temperature=0.0, stop=None)).sequences == frozen.sequences


def test_a_sampler_is_made_once_and_names_one_set_of_weights(client: RawClient) -> None:
    first = create(client, sampler_id="s:sample:0", base_model="bigram")
    assert create(client, sampler_id="s:sample:0", base_model="bigram") == first
    assert client.send(sampling_pb2.GetSamplerRequest(sampler_id="s:sample:0")) == first
    run = client.create(CONFIG)
    result = saved(client, run.run_id, 1)
    with pytest.raises(InvalidRequestError, match="other weights"):
        create(client, sampler_id="s:sample:0", path=result.path)
    for fields in ({}, {"base_model": "bigram", "path": "tg://x/weights/y"}):
        with pytest.raises(InvalidRequestError, match="base_model or path"):
            create(client, **fields)
    with pytest.raises(InvalidRequestError, match="offered"):
        create(client, base_model="gpt-9")
    with pytest.raises(InvalidRequestError, match="sampler_id"):
        create(client, sampler_id="x" * 129, base_model="bigram")
    client.send(sampling_pb2.DeleteSamplerRequest(sampler_id="s:sample:0"))
    for request in (
        sampling_pb2.GetSamplerRequest(sampler_id="s:sample:0"),
        sampling_pb2.DeleteSamplerRequest(sampler_id="s:sample:0"),
        query_to_proto(query(), sampler_id="s:sample:0"),
    ):
        with pytest.raises(ResourceNotFoundError):
            client.send(request)


def test_deleted_weights_are_gone_at_once_also_from_memory(client: RawClient) -> None:
    run = client.create(CONFIG)
    result = saved(client, run.run_id, 1)
    sampler = create(client, path=result.artifact_id)
    sample(client, sampler.sampler_id, query())
    client.send(artifacts_pb2.DeleteArtifactRequest(artifact_id=result.artifact_id))
    with pytest.raises(ResourceNotFoundError):
        sample(client, sampler.sampler_id, query())
    with pytest.raises(ResourceNotFoundError):
        create(client, path=result.path)


def test_a_sampler_works_after_a_restart(tmp_path: Path) -> None:
    config = ServerConfig(port=0, backend="bigram", data_dir=tmp_path / "data")
    with EmbeddedServer(config) as server:
        key = server.mint_key("tenant-a")
        client = RawClient(server.address, key)
        run = client.create(CONFIG)
        sampler = create(client, path=saved(client, run.run_id, 1).path)
        before = sample(client, sampler.sampler_id, query(seed=3))
    with EmbeddedServer(config) as server:
        client = RawClient(server.address, key)
        assert client.send(sampling_pb2.GetSamplerRequest(sampler_id=sampler.sampler_id)) == sampler
        assert sample(client, sampler.sampler_id, query(seed=3)) == before
        assert b"tg://" not in (tmp_path / "data" / "tg-tinker.db").read_bytes()


def test_fifty_requests_at_once_get_what_each_gets_alone(bigram_server: EmbeddedServer, client: RawClient) -> None:
    run = client.create(CONFIG)
    ids = [create(client, path=saved(client, run.run_id, seq).path).sampler_id for seq in (1, 4)]
    ids.append(create(client, base_model="bigram").sampler_id)
    asked = [query(f"text {i % 7}", seed=i, num_samples=1 + i % 3, max_tokens=5 + i % 11) for i in range(50)]
    alone = [sample(client, ids[i % 3], q).sequences for i, q in enumerate(asked)]
    clients = [RawClient(bigram_server.address, bigram_server.mint_key("tenant-a")) for _ in range(5)]
    with ThreadPoolExecutor(50) as pool:
        futures = [pool.submit(sample, clients[i % 5], ids[i % 3], q) for i, q in enumerate(asked)]
        together = [f.result(60).sequences for f in futures]
    assert together == alone
    wait_until(lambda: bigram_server._server._sampling._worker is None)
    assert bigram_server._server._sampling._live == {}
    assert all(not o.users for o in service(bigram_server)._open.values())


def test_hanging_up_frees_the_model(bigram_server: EmbeddedServer, client: RawClient) -> None:
    sampler = create(client, base_model="bigram")
    request = query_to_proto(replace(LONG, num_samples=512), sampler_id=sampler.sampler_id)  # would take minutes
    path = method_of(type(request)).path
    stream = client.channel.unary_stream(path)(request.SerializeToString(), metadata=client.metadata)
    next(stream)
    assert service(bigram_server)._waiting == {"tenant-a": 1}
    stream.cancel()
    wait_until(lambda: bigram_server._server._sampling._worker is None)
    assert bigram_server._server._sampling._sampler is not None
    assert bigram_server._server._sampling._sampler.idle
    assert service(bigram_server)._waiting == {}


def test_too_many_requests_are_told_to_wait(bigram_server: EmbeddedServer, client: RawClient) -> None:
    sampler = create(client, base_model="bigram")
    service(bigram_server)._most_waiting = 2
    request = query_to_proto(LONG, sampler_id=sampler.sampler_id)
    path = method_of(type(request)).path
    stream = client.channel.unary_stream(path)(request.SerializeToString(), metadata=client.metadata)
    next(stream)
    with pytest.raises(RateLimitedError) as caught:
        sample(client, sampler.sampler_id, query())
    assert caught.value.retry_after == 1.0
    other = RawClient(bigram_server.address, bigram_server.mint_key("tenant-b"))
    sample(other, create(other, base_model="bigram").sampler_id, query())  # half is left for others
    stream.cancel()
    wait_until(lambda: not service(bigram_server)._waiting)
    sample(client, sampler.sampler_id, query())


def test_weights_out_of_use_are_put_away_and_come_back(
    bigram_server: EmbeddedServer, client: RawClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_OPEN", 1)
    run = client.create(CONFIG)
    ids = [create(client, path=saved(client, run.run_id, seq).path).sampler_id for seq in (1, 4)]
    first = [sample(client, i, query(seed=2, prompt_logprobs=True)) for i in ids]
    assert len(service(bigram_server)._open) == 1
    assert first[0].prompt_logprobs != first[1].prompt_logprobs
    assert [sample(client, i, query(seed=2, prompt_logprobs=True)) for i in ids] == first


def test_one_bad_request_is_refused_alone(client: RawClient) -> None:
    sampler = create(client, base_model="bigram")
    with ThreadPoolExecutor(4) as pool:
        good = [pool.submit(sample, client, sampler.sampler_id, query(seed=i, max_tokens=50)) for i in range(3)]
        with pytest.raises(InvalidRequestError) as caught:
            sample(client, sampler.sampler_id, SampleQuery(prompt=(1, 260)))
        assert caught.value.field == "prompt"
        assert all(len(f.result(30).sequences[0].tokens) == 50 for f in good)


def test_training_goes_on_while_much_is_sampled(client: RawClient) -> None:
    sampler = create(client, base_model="bigram")
    run = client.create(CONFIG)
    request = query_to_proto(LONG, sampler_id=sampler.sampler_id)
    path = method_of(type(request)).path
    stream = client.channel.unary_stream(path)(request.SerializeToString(), metadata=client.metadata)
    got: list[int] = []

    def read() -> None:
        try:
            for raw in stream:
                reply = sampling_pb2.SampleTokensReply.FromString(raw)
                got.extend(len(e.tokens) // 4 for e in reply.sequences)
        except grpc.RpcError as e:  # pragma: no cover
            raise as_error(e) from e

    reader = threading.Thread(target=read)
    reader.start()
    wait_until(lambda: got)
    for seq in (1, 3, 5):
        assert client.call(run.run_id, seq, batch(seed=seq)).status == "completed"
        assert client.call(run.run_id, seq + 1, Step()).status == "completed"
    assert sum(got) < 4000, "sampling was over before training had a chance"
    reader.join(60)
    assert sum(got) == 4000


def test_prompts_of_another_tenant_are_not_remembered(bigram_server: EmbeddedServer, client: RawClient) -> None:
    other = RawClient(bigram_server.address, bigram_server.mint_key("tenant-b"))
    mine, theirs = (create(c, base_model="bigram").sampler_id for c in (client, other))
    text = "a secret that is long enough"
    assert sample(client, mine, query(text)).prompt_cache_hit_tokens == 0
    assert sample(other, theirs, query(text)).prompt_cache_hit_tokens == 0
    assert sample(client, mine, query(text)).prompt_cache_hit_tokens == len(text) - 1


def test_text_and_tokens_by_sampler(client: RawClient) -> None:
    sampler = create(client, base_model="bigram")
    [row] = client.send(sampling_pb2.EncodeRequest(sampler_id=sampler.sampler_id, texts=["hé"])).ids
    assert list(row.ids) == list("hé".encode())
    with pytest.raises(InvalidRequestError, match="0 to 259"):
        client.send(sampling_pb2.DecodeRequest(sampler_id=sampler.sampler_id, ids=[{"ids": [260]}]))
    assert np.isfinite(sample(client, sampler.sampler_id, query()).sequences[0].logprobs).all()


def test_a_key_with_a_policy_samples_base_models_and_nothing_of_other_datasets(
    bigram_server: EmbeddedServer, client: RawClient
) -> None:
    run = client.create(CONFIG)
    result = saved(client, run.run_id, 1)
    open_sampler = create(client, path=result.path)
    policy = KeyPolicy(dataset_id="secret", target_epsilon=8.0, target_delta=1e-5)
    bound = RawClient(bigram_server.address, bigram_server.mint_key("tenant-a", policy=policy))
    for request in (
        query_to_proto(query(), sampler_id=open_sampler.sampler_id),
        sampling_pb2.GetSamplerRequest(sampler_id=open_sampler.sampler_id),
        sampling_pb2.CreateSamplerRequest(path=result.artifact_id),
        sampling_pb2.EncodeRequest(sampler_id=open_sampler.sampler_id, texts=["x"]),
        sampling_pb2.DeleteSamplerRequest(sampler_id=open_sampler.sampler_id),
    ):
        with pytest.raises(ResourceNotFoundError):
            bound.send(request)
    base = create(bound, base_model="bigram")
    assert len(sample(bound, base.sampler_id, query()).sequences[0].tokens) == 8
    assert len(sample(client, open_sampler.sampler_id, query()).sequences[0].tokens) == 8

"""The official Tinker client, unmodified and in this process, against a server of ours."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tinker
from tinker import types

from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig

MODEL = "bigram"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    path = tmp_path_factory.mktemp("sdk")
    config = ServerConfig(port=0, tinker_port=0, backend="bigram", data_dir=path, tinker_gap_s=1.0)
    with EmbeddedServer(config) as running:
        yield running


@pytest.fixture(scope="module")
def credentials(server: EmbeddedServer) -> dict[str, str]:
    return {"base_url": server.tinker_url, "api_key": "tml-" + server.mint_key()}


@pytest.fixture
def service(credentials: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    client = tinker.ServiceClient(user_metadata={"who": "test"}, **credentials)
    yield client
    client.close("success").result(timeout=120)


def made(service: Any, **options: Any) -> Any:
    return service.create_lora_training_client(base_model=MODEL, rank=4, **options).result()


def datum(tokens: list[int], **inputs: Any) -> Any:
    given = {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1), **inputs}
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={k: v for k, v in given.items() if v is not None},
    )


def trained(client: Any, steps: int = 3) -> list[float]:
    losses = []
    for _ in range(steps):
        passed = client.forward_backward([datum([1, 2, 3, 4])], "cross_entropy")
        stepped = client.optim_step(types.AdamParams(learning_rate=0.1))
        losses.append(passed.result().metrics["loss:sum"])
        stepped.result()
    return losses


def test_a_training_loop_from_capabilities_to_a_lower_loss(service: Any) -> None:
    offered = [m.model_name for m in service.get_server_capabilities().supported_models]
    assert offered == [MODEL]
    client = made(service)
    info = client.get_info()
    assert (info.model_name, info.is_lora, info.lora_rank) == (MODEL, True, 4)
    losses = trained(client)
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "cispo", "dro", "gspo"])
def test_losses_on_samples(service: Any, loss: str) -> None:
    client = made(service)
    first = client.forward([datum([1, 2, 3, 4])], "cross_entropy").result().loss_fn_outputs[0]["logprobs"]
    advantages = [1.0, -0.5, 2.0]
    more: dict[str, Any] = {"sequence_ratio_mask": [1.0, 1.0, 1.0]} if loss == "gspo" else {}
    sent = datum([1, 2, 3, 4], weights=None, logprobs=first.tolist(), advantages=advantages, **more)
    passed = client.forward_backward([sent], loss).result()
    np.testing.assert_allclose(passed.loss_fn_outputs[0]["logprobs"].tolist(), first.tolist(), rtol=1e-4)
    by_hand = {"cispo": -np.dot(first.tolist(), advantages), "dro": -np.dot(first.tolist(), advantages)}
    assert passed.metrics["loss:sum"] == pytest.approx(by_hand.get(loss, -sum(advantages)), rel=1e-4)
    assert client.optim_step(types.AdamParams(learning_rate=0.01)).result().metrics["unclipped_grad_norm"] > 0


def test_targets_with_alternatives(service: Any) -> None:
    import torch

    client = made(service)
    several = types.Datum(
        model_input=types.ModelInput.from_ints([1, 2]),
        loss_fn_inputs={
            "target_tokens": types.TensorData.from_torch(torch.tensor([[2, 5], [3, 6]])),
            "weights": types.TensorData.from_torch(torch.tensor([[0.5, 0.0], [0.0, 0.25]])),
        },
    )
    result = client.forward_backward([several], "cross_entropy").result()
    logprobs = result.loss_fn_outputs[0]["logprobs"].to_torch()
    assert tuple(logprobs.shape) == (2, 2)
    by_hand = float(-0.5 * logprobs[0, 0] - 0.25 * logprobs[1, 1])
    assert result.metrics["loss:sum"] == pytest.approx(by_hand, rel=1e-5)


def test_a_custom_loss_is_computed_at_the_client_and_trained_on_here(service: Any) -> None:
    client = made(service)

    def squared(_data: Any, logprobs: Any) -> Any:
        loss = sum((lp**2).sum() for lp in logprobs)
        return loss, {"squared": float(loss)}

    def once() -> float:
        result = client.forward_backward_custom([datum([1, 2, 3])], squared).result()
        client.optim_step(types.AdamParams(learning_rate=0.1)).result()
        return float(result.metrics["squared"])

    assert once() > once()


def test_a_custom_loss_runs_on_the_server_as_a_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    config = ServerConfig(port=0, tinker_port=0, backend="torch", device="cpu", data_dir=tmp_path)
    with EmbeddedServer(config) as server:
        service = tinker.ServiceClient(base_url=server.tinker_url, api_key="tml-" + server.mint_key())
        try:
            _train_on_a_graph(service)
        finally:
            service.close("success").result(timeout=120)


def _train_on_a_graph(service: Any) -> None:
    client = service.create_lora_training_client(base_model="tiny-llama-2m", rank=4).result()

    def weighted(logprobs: Any, advantages: Any) -> Any:
        loss = -(logprobs * advantages).sum()
        return loss, {"custom/weighted:sum": loss}

    handle = service.create_custom_loss(weighted, {"logprobs": 1, "advantages": 1}).result()
    assert handle.loss_id
    sent = datum([1, 2, 3], weights=None, advantages=[2.0, -1.0])
    result = client.forward_backward_custom([sent], handle).result()
    lp = result.loss_fn_outputs[0]["logprobs"].tolist()
    assert result.metrics["loss:sum"] == pytest.approx(-2 * lp[0] + lp[1], rel=1e-4)


def test_weights_are_saved_loaded_and_trained_further(service: Any) -> None:
    client = made(service)
    before = trained(client, 2)
    path = client.save_state("two").result().path
    assert path == f"tinker://{client.model_id}/weights/two"
    after = trained(client, 1)[0]
    for with_optimizer in (False, True):
        create = (
            service.create_training_client_from_state_with_optimizer
            if with_optimizer
            else service.create_training_client_from_state
        )
        resumed = create(path).result()
        assert resumed.get_info().lora_rank == 4
        assert trained(resumed, 1)[0] == pytest.approx(after, rel=1e-6)
    assert after < before[1]
    with pytest.raises(tinker.RequestFailedError, match="name"):
        client.save_state("two").result()


def test_sampling_from_saved_and_from_ephemeral_weights(service: Any) -> None:
    client = made(service)
    trained(client, 1)
    path = client.save_weights_for_sampler("now").result().path
    named = service.create_sampling_client(model_path=path).result()
    ephemeral = client.save_weights_and_get_sampling_client()
    base = service.create_sampling_client(base_model=MODEL).result()
    prompt = types.ModelInput.from_ints([1, 2, 3, 4])
    params = types.SamplingParams(max_tokens=5, temperature=0.7, seed=3, stop=[])
    answers = {}
    for name, sampler in {"named": named, "ephemeral": ephemeral, "base": base}.items():
        response = sampler.sample(prompt, num_samples=2, sampling_params=params).result()
        assert [len(s.tokens) for s in response.sequences] == [5, 5]
        assert all(s.stop_reason == "length" and max(s.logprobs) <= 0 for s in response.sequences)
        answers[name] = [s.tokens for s in response.sequences]
    assert answers["named"] == answers["ephemeral"]
    scored = named.compute_logprobs(prompt).result()
    there = client.forward([datum([1, 2, 3, 4])], "cross_entropy").result().loss_fn_outputs[0]["logprobs"]
    assert scored[0] is None
    np.testing.assert_allclose(scored[1:], there.tolist(), rtol=1e-4)


def test_checkpoints_are_listed_kept_for_a_while_and_deleted(service: Any, credentials: dict[str, str]) -> None:
    client = made(service, user_metadata={"purpose": "listing"})
    path = client.save_state("listed").result().path
    rest = tinker.RestClient(**credentials)
    run = rest.get_training_run(client.model_id).result()
    assert (run.base_model, run.user_metadata) == (MODEL, {"purpose": "listing"})
    assert run.last_checkpoint.tinker_path == path
    assert client.model_id in {r.training_run_id for r in rest.list_training_runs(limit=100).result().training_runs}
    rest.set_checkpoint_ttl_from_tinker_path(path, 7200).result()
    (listed,) = rest.list_checkpoints(client.model_id).result().checkpoints
    assert listed.checkpoint_id == "weights/listed"
    assert listed.expires_at - listed.time < timedelta(hours=3)
    assert path in {c.tinker_path for c in rest.list_user_checkpoints(limit=100).result().checkpoints}
    with pytest.raises(tinker.APIStatusError, match="published"):
        rest.publish_checkpoint_from_tinker_path(path).result()
    rest.delete_checkpoint_from_tinker_path(path).result()
    assert rest.list_checkpoints(client.model_id).result().checkpoints == []
    with pytest.raises(tinker.RequestFailedError):
        service.create_training_client_from_state(path).result()
    session = rest.get_session(client.model_id.split(":")[0]).result()
    assert client.model_id in session.training_run_ids


def test_external_weights_are_fetched_without_a_key_and_opened_with_their_own(
    service: Any, credentials: dict[str, str]
) -> None:
    import pyrage
    from safetensors.numpy import load

    client = made(service)
    identity = pyrage.x25519.Identity.generate()
    rest = tinker.RestClient(**credentials)
    plain = client.save_weights_external("plain").result().path
    sealed = (
        client.save_weights_external("sealed", age_encryption_recipients=[str(identity.to_public())]).result().path
    )
    files: dict[str, dict[str, bytes]] = {}
    for name, path in {"plain": plain, "sealed": sealed}.items():
        answer = rest.get_external_weights_urls(path).result()
        files[name] = {n: httpx.get(url).raise_for_status().content for n, url in answer.urls.items()}
    opened = {n.removesuffix(".age"): pyrage.decrypt(data, [identity]) for n, data in files["sealed"].items()}
    assert all(n.endswith(".age") for n in files["sealed"])
    assert opened == files["plain"]
    weights = next(data for n, data in opened.items() if n.endswith(".safetensors"))
    assert load(weights)


def test_mistakes_are_told_in_words(service: Any, credentials: dict[str, str], server: EmbeddedServer) -> None:
    client = made(service)
    with pytest.raises(tinker.RequestFailedError, match="vocabulary"):
        client.forward_backward([datum([1, 10**6, 3])], "cross_entropy").result()
    with pytest.raises(tinker.RequestFailedError):  # the batch is incomplete
        client.optim_step(types.AdamParams(learning_rate=0.1)).result()
    assert len(trained(client, 1)) == 1  # and the client goes on
    with pytest.raises(tinker.RequestFailedError, match="nothing-like-this"):
        service.create_lora_training_client(base_model="nothing-like-this").result()
    foreign = tinker.ServiceClient(base_url=server.tinker_url, api_key="tml-" + server.mint_key("other"))
    saved = client.save_state("mine").result().path
    with pytest.raises(tinker.RequestFailedError, match="no such"):
        foreign.create_training_client_from_state(saved).result()
    foreign.close("success").result(timeout=120)


def test_ids_at_the_positions_of_a_prompt_are_scored_as_they_were_listed(service: Any) -> None:
    import torch

    sampler = service.create_sampling_client(base_model=MODEL).result()
    prompt, params = types.ModelInput.from_ints([1, 2, 3, 4]), types.SamplingParams(max_tokens=1)
    ids = torch.full((3, 40), -1)  # wide enough that the client sends it sparse
    ids[0, 1], ids[1, 0], ids[1, 30] = 2, 5, 6

    def scored(targets: Any) -> Any:
        return (
            sampler.sample(prompt, num_samples=1, sampling_params=params, target_prompt_logprobs=targets)
            .result()
            .target_prompt_logprobs
        )

    dense = scored(types.TensorData.from_torch(ids))
    sparse = scored(types.TensorData.from_torch_sparse(ids, pad_value=-1))
    by_hand = sampler.compute_logprobs(prompt).result()
    found = dense.to_torch()
    assert found[0, 1] == pytest.approx(by_hand[1])
    assert bool(((found == 0) == (ids == -1)).all())
    assert sparse.sparse_crow_indices is not None
    assert list(sparse.sparse_crow_indices) == [0, 1, 3, 3]
    assert list(sparse.sparse_col_indices) == [1, 0, 30]
    assert list(sparse.data) == [found[0, 1], found[1, 0], found[1, 30]]


@pytest.mark.parametrize(
    ("wrong", "count"), [({"max_tokens": 0}, 1), ({"top_p": 2.0}, 1), ({"temperature": -1.0}, 1), ({}, 0)]
)
def test_a_refused_sample_ends_in_an_error(service: Any, wrong: dict[str, Any], count: int) -> None:
    sampler = service.create_sampling_client(base_model=MODEL).result()
    prompt = types.ModelInput.from_ints([1, 2, 3])
    params = types.SamplingParams(**{"max_tokens": 2, **wrong})
    with pytest.raises(tinker.RequestFailedError):
        sampler.sample(prompt, num_samples=count, sampling_params=params).result(timeout=120)


def test_samples_under_way_at_a_restart_come_from_the_next_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    config = ServerConfig(port=0, tinker_port=port, backend="bigram", data_dir=tmp_path)
    prompt = types.ModelInput.from_ints([1, 2, 3])
    with EmbeddedServer(config) as first:
        key = first.mint_key()
        service = tinker.ServiceClient(base_url=first.tinker_url, api_key="tml-" + key)
        sampler = service.create_sampling_client(base_model=MODEL).result()
        params = [types.SamplingParams(max_tokens=200, seed=n, stop=[]) for n in range(6)]
        under_way = [sampler.sample(prompt, num_samples=16, sampling_params=p) for p in params]
        sampler.sample(prompt, num_samples=1, sampling_params=types.SamplingParams(max_tokens=1)).result(timeout=120)
    with EmbeddedServer(config):
        for future in under_way:
            assert [len(s.tokens) for s in future.result(timeout=300).sequences] == [200] * 16
        service.close("success").result(timeout=120)

"""The public API against a running server: what a user was told holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.server_process import batch
from tg_tinker import (
    DPBudgetExceededError,
    DPConfig,
    DPUnsupportedError,
    InvalidRequestError,
    OptimizerConfig,
    ResourceNotFoundError,
    ServiceClient,
    TrainingClient,
    TrainingConfig,
    hash_batch,
)
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.dp.accounting import prv_epsilon


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(ServerConfig(port=0, backend="bigram", data_dir=tmp_path / "data")) as running:
        yield running


@pytest.fixture
def service(server: EmbeddedServer) -> Iterator[ServiceClient]:
    with ServiceClient(api_key=server.mint_key("tenant-a"), base_url=server.address) as client:
        yield client


def create(service: ServiceClient, dp: DPConfig | None = None, **settings: object) -> TrainingClient:
    values = {"model_ref": "bigram", "batch_size": 4, "seed": 3, "dp_config": dp, **settings}
    values.setdefault("optimizer", OptimizerConfig(learning_rate=0.05))
    return service.create_training_client(TrainingConfig(**values))  # type: ignore[arg-type]


def step(client: TrainingClient, seed: int = 0) -> object:
    client.forward_backward(batch(seed)).result()
    return client.optim_step().result()


def dp(**settings: object) -> DPConfig:
    return DPConfig(**{"noise_multiplier": 2.0, "target_epsilon": 50.0, "dataset_id": "data-1", **settings})  # type: ignore[arg-type]


def test_steps_are_counted_only_when_they_succeed(service: ServiceClient) -> None:
    client = create(service)
    for seed in range(3):
        step(client, seed)
    with pytest.raises(InvalidRequestError, match=r"forward_backward .* first"):
        client.optim_step().result()
    assert client.step == 3
    assert client.status == "active"
    client.unload_model()
    assert client.status == "completed"


def test_a_run_is_completed_by_its_last_planned_step_and_can_still_be_sampled_and_saved(
    service: ServiceClient,
) -> None:
    client = create(service, max_steps=2)
    step(client, 0)
    step(client, 1)
    assert client.status == "completed"
    with pytest.raises(InvalidRequestError, match="completed"):
        client.forward_backward(batch(2)).result()
    assert client.sample("a", max_tokens=2).samples
    assert client.save_state().artifact_id


@pytest.mark.parametrize("private", [False, True])
def test_a_completed_run_is_looked_at_as_before_after_a_restart(tmp_path: Path, private: bool) -> None:
    config = ServerConfig(port=0, backend="bigram", data_dir=tmp_path / "data")
    with EmbeddedServer(config) as server:
        key = server.mint_key("tenant-a")
        with ServiceClient(api_key=key, base_url=server.address) as service:
            client = create(service, dp() if private else None, max_steps=2)
            step(client, 0)
            step(client, 1)
            weights, spent = client.pull_weights(), client.get_info().privacy
            client.eval()
            loss = client.forward_backward(batch(3)).result().loss
    with EmbeddedServer(config) as server, ServiceClient(api_key=key, base_url=server.address) as service:
        again = service.get_training_client(client.id)
        assert (again.step, again.status) == (2, "completed")
        assert again.get_info().privacy == spent
        again.eval()
        assert again.forward_backward(batch(3)).result().loss == loss
        found = again.pull_weights()
        assert all(np.array_equal(found.tensors[name], value) for name, value in weights.tensors.items())
        again.train()
        with pytest.raises(InvalidRequestError, match="completed"):
            again.forward_backward(batch(4)).result()
        assert again.save_state().artifact_id


def test_the_batch_hash_is_the_public_one_and_a_wrong_one_is_refused(service: ServiceClient) -> None:
    client = create(service)
    data = batch(1)
    result = client.forward_backward(data, hash_batch(data)).result()
    assert result.batch_hash == hash_batch({k: v.tolist() for k, v in data.items()})
    assert client.forward_backward(data, "my label").result().batch_hash == result.batch_hash
    with pytest.raises(InvalidRequestError) as caught:
        client.forward_backward(data, "sha256:" + "0" * 64).result()
    assert caught.value.field == "batch_hash"


def test_gradient_hashes_identify_without_privacy_and_are_keyed_with_it(service: ServiceClient) -> None:
    one, two = create(service), create(service)
    hashes = [c.forward_backward(batch(1)).result().gradient_hash for c in (one, two)]
    assert hashes[0] == hashes[1]
    assert hashes[0].startswith("sha256:")
    assert one.forward_backward(batch(2)).result().gradient_hash != hashes[0]
    keyed = [create(service, dp()).forward_backward(batch(1)).result() for _ in range(2)]
    assert all(r.gradient_hash.startswith("hmac-sha256:") and r.batch_hash.startswith("hmac-") for r in keyed)
    assert keyed[0].gradient_hash != keyed[1].gradient_hash


def test_tokens_are_counted_by_the_mask(service: ServiceClient) -> None:
    data = {"input_ids": [[1, 2, 3], [4, 5, 6]], "attention_mask": [[1, 1, 0], [1, 1, 1]]}
    result = create(service).forward_backward(data).result()
    assert result.num_tokens == 5
    assert result.latency_ms > 0


def test_eval_leaves_no_gradient_and_repeats(service: ServiceClient) -> None:
    client = create(service)
    client.eval()
    results = [client.forward_backward(batch(1)).result() for _ in range(2)]
    assert results[0].loss == results[1].loss
    assert results[0].gradient_hash == ""
    client.train()
    with pytest.raises(InvalidRequestError):
        client.optim_step().result()


def test_what_steps_spend_adds_up_and_clipping_is_reported(service: ServiceClient) -> None:
    client = create(service, dp(max_grad_norm=1e-3))
    spent = []
    for seed in range(4):
        metrics = step(client, seed).dp_metrics
        spent.append(metrics.epsilon_spent)
        assert metrics.noise_applied
        assert metrics.num_clipped == 4
        assert metrics.grad_norm_after_clip <= 1e-3 < metrics.grad_norm_before_clip
    assert sum(spent) == pytest.approx(metrics.total_epsilon, abs=1e-9)
    assert step(create(service, dp(max_grad_norm=1e6))).dp_metrics.num_clipped == 0


def test_a_step_without_noise_is_refused_and_with_permission_voids_the_dataset(service: ServiceClient) -> None:
    client = create(service, dp())
    client.forward_backward(batch(1)).result()
    with pytest.raises(DPUnsupportedError) as caught:
        client.optim_step(apply_dp_noise=False).result()
    assert (caught.value.feature, client.step) == ("apply_dp_noise", 0)
    assert "allow_unnoised_steps" in caught.value.alternative
    assert client.optim_step().result().step == 1  # the batch was kept
    free = create(service, dp(target_epsilon=None, allow_unnoised_steps=True, dataset_id="void"))
    free.forward_backward(batch(1)).result()
    metrics = free.optim_step(apply_dp_noise=False).result().dp_metrics
    assert (metrics.noise_applied, metrics.total_epsilon) == (False, float("inf"))
    assert step(free, 2).dp_metrics.total_epsilon == float("inf")


def test_the_budget_ends_training_and_nothing_else(service: ServiceClient) -> None:
    client = create(service, dp(target_epsilon=4.0))
    for seed in range(client.privacy.steps_remaining()):
        step(client, seed)
    with pytest.raises(DPBudgetExceededError) as caught:
        step(client, 99)
    error = caught.value
    assert error.current_epsilon <= error.max_epsilon == 4.0
    assert error.details["delta"] == error.delta == 1e-5
    assert client.step == seed + 1
    assert client.privacy.total_epsilon == error.current_epsilon
    saved = client.save_state()
    assert client.sample("a", max_tokens=1).samples
    assert client.load_state(saved.artifact_id).step == seed + 1


def test_loading_an_older_state_rewinds_steps_and_never_the_budget(service: ServiceClient) -> None:
    client = create(service, dp())
    for seed in range(2):
        step(client, seed)
    saved = client.save_state(metadata={"epoch": 5, "dataset": "v2"})
    for seed in range(3):
        last = step(client, 10 + seed)
    loaded = client.load_state(saved.artifact_id)
    assert (loaded.step, client.step, loaded.metadata) == (2, 2, {"epoch": 5, "dataset": "v2"})
    assert loaded.timestamp == saved.timestamp
    assert saved.timestamp.tzinfo is not None
    assert client.privacy.total_epsilon == last.dp_metrics.total_epsilon
    assert step(client, 20).dp_metrics.total_epsilon > last.dp_metrics.total_epsilon
    other = create(service, dp())
    assert other.privacy.total_epsilon == client.privacy.total_epsilon


def test_a_loaded_run_takes_the_same_next_step(service: ServiceClient) -> None:
    client = create(service)
    for seed in range(2):
        step(client, seed)
    saved = client.save_state()
    third = step(client, 2).grad_norm
    for seed in range(3, 6):
        step(client, seed)
    client.load_state(saved.artifact_id)
    assert step(client, 2).grad_norm == third
    small = client.save_state(include_optimizer=False)
    assert small.size_bytes < saved.size_bytes
    assert saved.encryption.algorithm == "AES-256-GCM"


def test_a_flipped_bit_in_the_store_is_refused_and_the_run_goes_on(service: ServiceClient, tmp_path: Path) -> None:
    client = create(service)
    step(client)
    saved = client.save_state(metadata={"secret": "canary-7c1"})
    pulled = service.pull_artifact(saved.artifact_id, str(tmp_path / "out.bin"))
    assert (tmp_path / "out.bin").read_bytes() == pulled
    assert b"canary" not in pulled
    (path,) = [p for p in (tmp_path / "data" / "artifacts").rglob("*") if saved.artifact_id in p.name]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(InvalidRequestError, match="verification"):
        client.load_state(saved.artifact_id)
    assert step(client, 1).step == 2


def test_cancelling_a_queued_pass_is_as_if_it_had_never_been_sent(service: ServiceClient) -> None:
    def run(with_cancelled: bool) -> float:
        client = create(service)
        before = [client.forward_backward(batch(seed)) for seed in range(30)]
        if with_cancelled:
            extra = client.forward_backward(batch(99))
            assert extra.cancel()  # thirty passes stand before it
            assert extra.status == "cancelled"
        before[-1].result()
        client.optim_step().result()
        return client.forward_backward(batch(2)).result().loss

    assert run(True) == run(False)


def test_pipelining_twenty_steps_equals_waiting_for_each(service: ServiceClient) -> None:
    patient, hasty = create(service), create(service)
    waited = [step(patient, s).grad_norm for s in range(20)]
    futures = []
    for s in range(20):
        hasty.forward_backward(batch(s))
        futures.append(hasty.optim_step())
    assert [f.result().grad_norm for f in futures] == waited


def test_a_failed_pass_makes_the_step_fail_rather_than_apply_a_part(service: ServiceClient) -> None:
    client = create(service)
    client.forward_backward(batch(1))
    client.forward_backward({"input_ids": [[10**6, 1]]})
    with pytest.raises(InvalidRequestError, match="incomplete"):
        client.optim_step().result()
    assert step(client, 2).step == 1


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "adafactor"])
def test_every_optimizer_learns(service: ServiceClient, name: str) -> None:
    client = create(service, optimizer=OptimizerConfig(name=name, learning_rate=0.5 if name == "sgd" else 0.05))
    losses = []
    for _ in range(8):
        losses.append(client.forward_backward(batch(1)).result().loss)
        client.optim_step().result()
    assert losses[-1] < losses[0]


def test_the_audit_log_is_a_chain_without_content(service: ServiceClient, tmp_path: Path) -> None:
    client = create(service, dp())
    client.sample("canary-prompt-5e1", max_tokens=2)
    step(client)
    client.save_state(metadata={"note": "canary-note-5e1"})
    logs = service.get_audit_logs()
    assert [e.operation for e in logs] == ["sample", "forward_backward", "optim_step", "save_state"]
    for before, after in pairwise(logs):
        assert after.prev_hash == before.record_hash
    assert logs[3].artifact_ids
    assert float(logs[2].dp_metrics["total_epsilon"]) > 0
    assert service.get_audit_logs(operation="sample")[0].training_client_id == client.id
    for path in (tmp_path / "data").rglob("*"):
        if path.is_file():
            assert b"canary" not in path.read_bytes(), path


def test_poisson_empty_draws_are_noised_steps_and_amplified(service: ServiceClient) -> None:
    config = dp(sampling="poisson", dataset_size=400, dataset_id="drawn", noise_multiplier=1.0)
    client = create(service, config)
    client.forward_backward({"input_ids": np.zeros((0, 0), dtype=np.int64)}).result()
    metrics = client.optim_step().result().dp_metrics
    unamplified = step(create(service, dp(noise_multiplier=1.0, dataset_id="raw"))).dp_metrics
    assert metrics.noise_applied
    assert metrics.total_epsilon < unamplified.total_epsilon
    assert "attested by the client" in json.dumps(service.get_privacy_report("drawn"))
    assert "attested" not in json.dumps(service.get_privacy_report("raw"))
    with pytest.raises(InvalidRequestError):
        create(service).forward_backward({"input_ids": np.zeros((0, 0), dtype=np.int64)}).result()


def test_taking_part_too_often_is_refused(service: ServiceClient) -> None:
    config = dp(sampling="max_participation", max_participation=1, dataset_id="counted")
    client = create(service, config)
    for half in range(2):
        client.forward_backward(batch(half), privacy_unit_ids=[f"u{half}-{i}" for i in range(4)]).result()
        metrics = client.optim_step().result().dp_metrics
    assert metrics.epsilon_spent == 0.0  # disjoint units: one epoch costs one release
    client.forward_backward(batch(5), privacy_unit_ids=["u0-0", "n1", "n2", "n3"]).result()
    with pytest.raises(InvalidRequestError, match="max_participation=1"):
        client.optim_step().result()


def test_a_unit_may_come_once_in_a_logical_batch(service: ServiceClient) -> None:
    client = create(service, dp(privacy_unit="user"))
    client.forward_backward(batch(1), privacy_unit_ids=["a", "a", "b", "c"]).result()
    with pytest.raises(InvalidRequestError) as caught:
        client.forward_backward(batch(2), privacy_unit_ids=["c", "d", "e", "f"]).result()
    assert caught.value.field == "privacy_unit_ids"
    merging = create(service, dp(privacy_unit="user", merge_units=True, dataset_id="merged"))
    for seed in (1, 2):
        merging.forward_backward(batch(seed), privacy_unit_ids=["a", "b", "c", "d"]).result()
    assert merging.optim_step().result().step == 1


def test_diagnostics_off_returns_none_of_them(service: ServiceClient) -> None:
    client = create(service, dp(diagnostics="off"))
    result = client.forward_backward(batch(1)).result()
    assert np.isnan(result.loss)
    assert result.metrics == {}
    metrics = client.optim_step().result()
    assert np.isnan(metrics.dp_metrics.grad_norm_before_clip)
    assert metrics.dp_metrics.num_clipped == -1
    assert metrics.dp_metrics.total_epsilon > 0


def test_a_forecast_is_what_the_steps_then_cost(service: ServiceClient) -> None:
    client = create(service, dp())
    step(client)
    forecast = client.privacy.epsilon_after(5)
    remaining = client.privacy.steps_remaining()
    for seed in range(5):
        last = step(client, seed)
    assert last.dp_metrics.total_epsilon == pytest.approx(forecast, abs=1e-9)
    assert client.privacy.steps_remaining() == remaining - 5


def test_auto_noise_makes_the_budget_last_for_the_planned_steps(service: ServiceClient) -> None:
    config = dp(noise_multiplier="auto", target_epsilon=3.0, sampling="poisson", dataset_size=100)
    client = create(service, config, max_steps=6)
    for seed in range(6):
        total = step(client, seed).dp_metrics.total_epsilon
    assert 2.9 < total <= 3.0
    with pytest.raises(DPBudgetExceededError):
        create(service, config, max_steps=6)


def test_prv_counts_less_for_a_plan_fixed_in_advance(service: ServiceClient) -> None:
    config = dp(
        sampling="poisson", dataset_size=40, noise_multiplier=1.0, accountant_type="prv", dataset_id="planned"
    )
    client = create(service, config, max_steps=3)
    for seed in range(3):
        total = step(client, seed).dp_metrics.total_epsilon
    rdp = create(service, config.model_copy(update={"accountant_type": "rdp", "dataset_id": "rdp"}), max_steps=3)
    for seed in range(3):
        by_rdp = step(rdp, seed).dp_metrics.total_epsilon
    assert total < by_rdp
    assert total >= prv_epsilon(1.0, 0.1, 3, 1e-5) - 1e-9


def test_presets_and_capabilities_say_what_the_catalogue_says(service: ServiceClient) -> None:
    strong = DPConfig.preset("strong")
    assert (strong.noise_multiplier, strong.max_grad_norm, strong.target_epsilon) == (1.5, 0.5, 3.0)
    capabilities = service.get_server_capabilities()
    losses = ["cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo", "custom"]
    assert capabilities.losses == losses
    assert capabilities.reducers == ["mean", "sum", "min", "max", "slack", "unique", "hash_unordered", "hash2"]
    assert "bigram" in [m.name for m in capabilities.models]
    assert capabilities.tenant_id == "tenant-a"


def test_the_ledger_comes_whole_and_verifies_here(service: ServiceClient) -> None:
    client = create(service, dp())
    for seed in range(3):
        step(client, seed)
    ledger = service.get_privacy_ledger("data-1")
    ledger.verify()
    assert ledger.epsilon_spent == client.privacy.total_epsilon
    assert len(ledger.charges) == 3
    service.delete_training_client(client.id)
    assert service.get_privacy_ledger("data-1").epsilon_spent == ledger.epsilon_spent
    with pytest.raises(ResourceNotFoundError):
        service.get_training_client(client.id)

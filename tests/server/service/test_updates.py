"""Rows computed elsewhere, under every rule of a pass: clipping, charges, refusals, poison, what is shown.

Shape suffixes: U units or rows, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.server.rpc.raw_client import RawClient
from tg_tinker import ServiceClient
from tg_tinker.errors import AuthorizationError, DPBudgetExceededError, InvalidRequestError, ServerError
from tg_tinker.types import BatchData, DPConfig, LoRAConfig, OptimizerConfig, TrainingConfig
from tg_tinker.wire.calls import Step, Updates
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.engine.vector import VectorSession

P = 6
SGD = OptimizerConfig(name="sgd", learning_rate=1.0, momentum=0.0, nesterov=False)
SITES = [f"site {i}" for i in range(4)]
ROLES = ("trainer", "exporter", "auditor")
CLIP = 0.5


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    config = ServerConfig(port=0, backend="bigram", data_dir=tmp_path / "data", max_batch_records=8)
    with EmbeddedServer(config) as running:
        yield running


@pytest.fixture
def service(server: EmbeddedServer) -> Iterator[ServiceClient]:
    with ServiceClient(server.mint_key("default", ROLES), server.address) as client:
        yield client


def config(size: int = P, batch_size: int = 4, **dp: Any) -> TrainingConfig:
    given = {"privacy_unit": "site", "max_grad_norm": CLIP, "target_epsilon": 1e6, **dp}
    return TrainingConfig(
        model_ref=f"vector:{size}", batch_size=batch_size, optimizer=SGD, dp_config=DPConfig(**given) if dp else None
    )


def exact(**dp: Any) -> TrainingConfig:
    """Steps without noise, so that what was clipped and summed shows."""
    return config(**{"dataset_id": "exact", "allow_unnoised_steps": True, "target_epsilon": None, **dp})


def rows(seed: int = 3, count: int = 4) -> Any:
    return np.random.default_rng(seed).normal(0.0, 1.0, (count, P)).astype(np.float32)


def vector_of(tc: Any) -> Any:
    return tc.pull_weights().tensors["vector"].astype(np.float64)


def stepped(service: ServiceClient, made: TrainingConfig, vectors_UP: Any, units: list[str]) -> Any:
    """What one exact step with these rows moves, times the divisor: the sum that it used."""
    tc = service.create_training_client(made)
    tc.add_updates(vectors_UP, units)
    tc.optim_step(apply_dp_noise=False).result()
    return -vector_of(tc) * made.expected_batch_size


def test_without_privacy_a_step_moves_against_the_mean_of_the_rows(service: ServiceClient) -> None:
    tc = service.create_training_client(config())
    first, second = rows(1, 3), rows(2, 2)
    tc.add_updates(first, SITES[:3])
    tc.add_updates(second, SITES[:2])
    done = tc.optim_step().result()
    assert (done.step, done.dp_metrics, done.receipt) == (1, None, None)
    mean_P = np.concatenate([first, second]).astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(vector_of(tc), -mean_P, atol=1e-6)


def test_each_unit_is_clipped_once_over_all_its_rows(service: ServiceClient) -> None:
    vectors_UP, units = rows(count=5), ["a", "b", "a", "c", "b"]
    expected_P = np.zeros(P)
    for unit in set(units):
        whole_P = sum(v.astype(np.float64) for v, u in zip(vectors_UP, units, strict=True) if u == unit)
        expected_P += whole_P * min(1.0, CLIP / np.linalg.norm(whole_P))
    np.testing.assert_allclose(stepped(service, exact(), vectors_UP, units), expected_P, atol=1e-6)


@pytest.mark.parametrize("value", [1e30, math.nan, math.inf, -math.inf, 0.0])
def test_removing_any_unit_moves_the_sum_by_at_most_the_bound(service: ServiceClient, value: float) -> None:
    vectors_UP = rows()
    vectors_UP[2, 1:3] = value
    whole_P = stepped(service, exact(), vectors_UP, SITES)
    assert np.isfinite(whole_P).all()
    for left_out in range(len(SITES)):
        stay = [i for i in range(len(SITES)) if i != left_out]
        without_P = stepped(service, exact(), vectors_UP[stay], [SITES[i] for i in stay])
        moved = np.linalg.norm(whole_P - without_P)
        assert moved <= CLIP * (1 + 1e-6)
        assert (moved == 0) == (left_out == 2 and not math.isfinite(value))


def test_a_row_that_is_not_finite_is_counted_and_adds_nothing(service: ServiceClient) -> None:
    vectors_UP = rows()
    vectors_UP[1, 0] = math.nan
    tc = service.create_training_client(exact())
    tc.add_updates(vectors_UP, SITES)
    done = tc.optim_step(apply_dp_noise=False).result()
    assert done.metrics["nonfinite_units"] == 1.0
    without = stepped(service, exact(), np.delete(vectors_UP, 1, axis=0), [s for s in SITES if s != SITES[1]])
    np.testing.assert_array_equal(-vector_of(tc) * 4, without)


def charges(service: ServiceClient, dataset_id: str) -> list[tuple[Any, ...]]:
    ledger = service.get_privacy_ledger(dataset_id)
    ledger.verify()
    return [(e.kind, e.body.get("event"), e.body.get("epsilon_after")) for e in ledger.entries if e.kind == "charge"]


def test_a_step_of_updates_costs_what_the_same_step_of_a_pass_costs(service: ServiceClient) -> None:
    batch = BatchData(input_ids=np.arange(1, 41).reshape(4, 10))
    for sampling in ({}, {"sampling": "poisson", "dataset_size": 40}, {"sampling": "max_participation"}):
        made = {**sampling, "noise_multiplier": 1.3, "target_epsilon": 50.0}
        if "max_participation" in sampling.values():
            made["max_participation"] = 3
        name = str(made.get("sampling", "none"))
        vectors = service.create_training_client(config(dataset_id=f"v-{name}", **made))
        model = service.create_training_client(
            config(dataset_id=f"m-{name}", **made).model_copy(update={"model_ref": "bigram"})
        )
        for _ in range(3):
            vectors.add_updates(rows(), SITES)
            model.forward_backward(batch, privacy_unit_ids=SITES)
            one, other = vectors.optim_step().result(), model.optim_step().result()
            assert one.dp_metrics.epsilon_spent == other.dp_metrics.epsilon_spent > 0
            assert one.receipt is not None
        paid = charges(service, f"v-{name}")
        assert len(paid) == 3
        assert all(event["noise_multiplier"] == "1.3" for _, event, _ in paid)
        assert paid == charges(service, f"m-{name}")


def test_the_noise_of_a_step_has_the_scale_that_was_paid_for(service: ServiceClient) -> None:
    size, sigma = 50_000, 2.0
    tc = service.create_training_client(config(size, dataset_id="noise", noise_multiplier=sigma))
    tc.add_updates(np.zeros((1, size), np.float32), SITES[:1])
    tc.optim_step().result()
    noise = vector_of(tc) * 4 / (sigma * CLIP)
    # Of 50,000 standard normals: mean within 5 / sqrt(n), variance within 5 * sqrt(2 / n) of 1.
    assert abs(noise.mean()) < 5 / math.sqrt(size)
    assert abs(noise.var() - 1) < 5 * math.sqrt(2 / size)


def test_a_report_tells_of_steps_of_updates_as_of_any_others(service: ServiceClient) -> None:
    tc = service.create_training_client(config(dataset_id="told", target_epsilon=30.0))
    tc.add_updates(rows(), SITES)
    spent = tc.optim_step().result().dp_metrics.total_epsilon
    report = service.get_privacy_report("told")
    assert report["guarantee"]["privacy_unit"] == "site"
    assert float(report["guarantee"]["epsilon"]) <= spent


def test_an_empty_draw_takes_its_step_and_pays_for_it(service: ServiceClient) -> None:
    poisson = config(dataset_id="drawn", sampling="poisson", dataset_size=40)
    tc = service.create_training_client(poisson)
    tc.add_updates(np.zeros((0, P), np.float32), [])
    assert tc.optim_step().result().dp_metrics.epsilon_spent > 0
    other = service.create_training_client(config(dataset_id="chosen"))
    with pytest.raises(InvalidRequestError, match="no row"):
        other.add_updates(np.zeros((0, P), np.float32), []).result()


def test_updates_that_could_not_be_paid_for_are_refused_and_leave_the_batch_sound(service: ServiceClient) -> None:
    tc = service.create_training_client(config(dataset_id="small", noise_multiplier=1.0, target_epsilon=5.0))
    tc.add_updates(rows(), SITES)
    tc.optim_step().result()
    before = vector_of(tc)
    with pytest.raises(DPBudgetExceededError):
        tc.add_updates(rows(), SITES).result()
    assert len(charges(service, "small")) == 1
    np.testing.assert_array_equal(vector_of(tc), before)


def test_a_unit_that_comes_again_poisons_the_batch_and_costs_nothing(service: ServiceClient) -> None:
    tc = service.create_training_client(config(dataset_id="twice"))
    tc.add_updates(rows(1, 1), ["a"])
    with pytest.raises(InvalidRequestError, match="unit"):
        tc.add_updates(rows(2, 1), ["a"]).result()
    with pytest.raises(InvalidRequestError, match="its batch is incomplete"):
        tc.optim_step().result()
    assert charges(service, "twice") == []
    tc.add_updates(rows(1, 1), ["a"])
    assert tc.optim_step().result().step == 1


def test_a_unit_that_takes_part_too_often_is_refused_at_the_charge(service: ServiceClient) -> None:
    tc = service.create_training_client(
        config(dataset_id="counted", sampling="max_participation", max_participation=1)
    )
    tc.add_updates(rows(1, 1), ["a"])
    tc.optim_step().result()
    tc.add_updates(rows(1, 1), ["a"])
    with pytest.raises(InvalidRequestError):
        tc.optim_step().result()
    assert len(charges(service, "counted")) == 1


def test_a_draw_that_was_none_is_refused(service: ServiceClient) -> None:
    made = config(batch_size=1, dataset_id="claimed", sampling="poisson", dataset_size=1000)
    tc = service.create_training_client(made)
    for call in range(6):
        tc.add_updates(rows(call, 8), [f"{call}-{i}" for i in range(8)])
    with pytest.raises(InvalidRequestError, match="48 units"):
        tc.optim_step().result()
    assert charges(service, "claimed") == []


@pytest.mark.parametrize(
    ("vectors", "units", "field"),
    [
        (np.zeros((2, P + 1), np.float32), SITES[:2], "vectors"),
        (np.zeros((2, P)), SITES[:2], "vectors"),
        (np.zeros(P, np.float32), SITES[:1], "vectors"),
        (np.zeros((9, P), np.float32), [str(i) for i in range(9)], "vectors"),
        (np.zeros((2, P), np.float32), SITES[:1], "privacy_unit_ids"),
        (np.zeros((2, P), np.float32), [], "privacy_unit_ids"),
    ],
    ids=["parameters", "float64", "one dimension", "too many", "a unit short", "no units"],
)
def test_rows_that_do_not_fit_are_refused_whatever_the_client(
    server: EmbeddedServer, vectors: Any, units: list[str], field: str
) -> None:
    client = RawClient(server.address, server.mint_key())
    run = client.create(config(dataset_id="raw"))
    got = client.call(run.run_id, 1, Updates(vectors_UP=vectors, units=tuple(units)))
    assert isinstance(got.error, InvalidRequestError)
    assert got.error.field == field
    refused = client.call(run.run_id, 2, Step()).error
    assert isinstance(refused, InvalidRequestError)
    assert "incomplete" in refused.message


def test_larger_requests_than_others_may_be_made_pass(server: EmbeddedServer, service: ServiceClient) -> None:
    size = 2 * 2**20  # 8 MiB a row
    tc = service.create_training_client(config(size))
    tc.add_updates(np.ones((1, size), np.float32), ["a"])
    tc.optim_step().result()
    assert vector_of(tc).tolist()[:2] == [-1.0, -1.0]


def test_runs_on_models_take_no_rows_and_runs_on_vectors_no_records(service: ServiceClient) -> None:
    model = service.create_training_client(TrainingConfig(model_ref="bigram", lora_config=LoRAConfig()))
    with pytest.raises(InvalidRequestError, match="vector:"):
        model.add_updates(rows(), SITES).result()
    vectors = service.create_training_client(config())
    with pytest.raises(InvalidRequestError, match="add_updates"):
        vectors.forward_backward(BatchData(input_ids=[[1, 2]])).result()
    ended = service.create_training_client(config().model_copy(update={"max_steps": 1}))
    ended.add_updates(rows(), SITES)
    ended.optim_step().result()
    with pytest.raises(InvalidRequestError, match="completed"):
        ended.add_updates(rows(), SITES).result()


def test_diagnostics_are_shown_to_the_owner_or_to_nobody(service: ServiceClient) -> None:
    open_ = service.create_training_client(config(dataset_id="open"))
    shut = service.create_training_client(config(dataset_id="shut", diagnostics="off"))
    for tc, shown in ((open_, True), (shut, False)):
        passed = tc.add_updates(rows(), SITES).result()
        assert (passed.metrics.get("records:sum") == 4.0) == shown
        assert math.isnan(passed.loss) != shown
        assert passed.batch_hash.startswith("hmac-sha256:")
        assert passed.gradient_hash.startswith("hmac-sha256:")
        dp = tc.optim_step().result().dp_metrics
        assert math.isnan(dp.grad_norm_before_clip) != shown
    same = service.create_training_client(config()).add_updates(rows(), SITES).result()
    expected = "sha256:" + Updates(vectors_UP=rows(), units=()).digest().hex()
    assert same.batch_hash == expected


def test_updates_are_noted_without_how_many_they_were(service: ServiceClient) -> None:
    tc = service.create_training_client(config(dataset_id="noted"))
    tc.add_updates(rows(), SITES).result()
    (record,) = service.get_audit_logs(operation="add_updates")
    assert (record.training_client_id, record.success, record.request_bytes) == (tc.id, True, 0)
    assert record.request_hash.startswith("hmac-sha256:")
    assert record.facts == {}


def test_who_may_not_train_adds_nothing(server: EmbeddedServer, service: ServiceClient) -> None:
    tc = service.create_training_client(config())
    with ServiceClient(server.mint_key("default", ("sampler", "exporter")), server.address) as other:
        future = other.get_training_client(tc.id).add_updates(rows(), SITES)
        with pytest.raises(AuthorizationError):
            future.result()
    tc.add_updates(rows(), SITES)
    tc.optim_step().result()
    np.testing.assert_allclose(vector_of(tc), -rows().mean(axis=0), atol=1e-6)


def test_a_failure_inside_the_engine_leaves_nothing_in_the_batch(
    service: ServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    tc = service.create_training_client(config(dataset_id="broken"))
    real = VectorSession.contribute

    def broken(self: Any, vectors_UP: Any, units: Any) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(VectorSession, "contribute", broken)
    with pytest.raises(ServerError):
        tc.add_updates(rows(), SITES).result()
    monkeypatch.setattr(VectorSession, "contribute", real)
    with pytest.raises(InvalidRequestError, match="incomplete"):
        tc.optim_step().result()
    tc.add_updates(rows(), SITES)
    assert tc.optim_step().result().step == 1


def test_a_run_whose_batches_the_server_draws_takes_no_rows(service: ServiceClient) -> None:
    service.create_dataset("kept", [f"record {i}" for i in range(40)], target_epsilon=100.0, target_delta=1e-5)
    made = config(dataset_id="kept", sampling="poisson", privacy_unit="datum", target_epsilon=100.0)
    tc = service.create_training_client(made)
    with pytest.raises(InvalidRequestError, match="the server draws"):
        tc.add_updates(rows(), SITES).result()

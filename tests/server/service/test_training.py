"""forward_backward on datums, through the real server and the NumPy model."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.server.rpc.raw_client import RawClient, batch
from tests.server.service.datum_calls import CONFIG, CROSS_ENTROPY, datum, error_of, loss_pass, private
from tg_tinker.errors import (
    DPBudgetExceededError,
    DPUnsupportedError,
    InvalidRequestError,
    ResourceNotFoundError,
)
from tg_tinker.proto.v1 import training_pb2
from tg_tinker.types.datum import Datum, ModelInput, TensorData
from tg_tinker.types.losses import LOSSES, Loss
from tg_tinker.wire.call_messages import call_to_proto
from tg_tinker.wire.calls import LossPass, Position, Save, Step
from tg_tinker.wire.datums import data_digest
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig


def test_outputs_are_the_targets_log_probabilities_and_the_loss_is_their_weighted_sum(client: RawClient) -> None:
    run = client.create(CONFIG)
    call = loss_pass(train=False)
    result: Any = client.call(run.run_id, 1, call).result
    assert result.loss_fn_output_type == "ArrayRecord"
    logprobs = [o["logprobs"].to_numpy() for o in result.loss_fn_outputs]
    assert [p.dtype for p in logprobs] == [np.float32, np.float32]
    assert [p.shape for p in logprobs] == [(6,), (4,)]
    weights = [d.loss_fn_inputs["weights"].to_numpy() for d in call.data]
    expected = -sum(float(p.astype(np.float64) @ w) for p, w in zip(logprobs, weights, strict=True))
    assert result.metrics["loss:sum"] == pytest.approx(expected, rel=1e-5)
    assert all(name.count(":") == 1 for name in result.metrics)
    assert result.batch_hash == "sha256:" + data_digest(call.data).hex()
    assert result.gradient_hash == ""


def test_two_calls_add_up_to_one(client: RawClient) -> None:
    """Nothing is divided: the step after both halves is the step after the whole."""
    norms = []
    for calls in ([loss_pass()], [loss_pass(datum()), loss_pass(datum(4, 1))]):
        run = client.create(CONFIG)
        for seq, call in enumerate(calls, 1):
            assert client.call(run.run_id, seq, call).status == "completed"
        stepped: Any = client.call(run.run_id, len(calls) + 1, Step()).result
        norms.append(stepped.metrics["unclipped_grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert norms[0] > 0


def test_alternatives_have_outputs_of_their_own_shape(client: RawClient) -> None:
    run = client.create(CONFIG)
    rng = np.random.default_rng(0)
    two = datum(
        5,
        target_tokens=TensorData(rng.integers(1, 200, (5, 3)), "int64"),
        weights=TensorData(rng.uniform(size=(5, 3)), "float32"),
    )
    result: Any = client.call(run.run_id, 1, loss_pass(two)).result
    assert result.loss_fn_outputs[0]["logprobs"].shape == [5, 3]


def test_without_diagnostics_a_pass_tells_nothing(client: RawClient) -> None:
    run = client.create(private(diagnostics="off"))
    call = loss_pass()
    result: Any = client.call(run.run_id, 1, call).result
    assert [o["logprobs"].shape for o in result.loss_fn_outputs] == [[6], [4]]
    assert all(np.isnan(o["logprobs"].to_numpy()).all() for o in result.loss_fn_outputs)
    assert [name for name in result.metrics if not name.startswith("privacy/")] == ["loss:sum"]
    assert math.isnan(result.metrics["loss:sum"])
    assert math.isnan(result.loss)
    assert result.num_tokens == 0
    assert result.batch_hash.startswith("hmac-sha256:")
    assert data_digest(call.data).hex() not in result.batch_hash


def test_the_owner_sees_the_figures_of_a_private_pass(client: RawClient) -> None:
    run = client.create(private(diagnostics="owner"))
    result: Any = client.call(run.run_id, 1, loss_pass()).result
    assert np.isfinite(result.loss_fn_outputs[0]["logprobs"].to_numpy()).all()
    assert math.isfinite(result.metrics["loss:sum"])


def test_a_logical_batch_is_made_of_one_form(client: RawClient) -> None:
    run = client.create(CONFIG)
    assert client.call(run.run_id, 1, batch()).status == "completed"
    assert "not of both" in error_of(client, run.run_id, 2, loss_pass()).message
    assert "incomplete" in error_of(client, run.run_id, 3, Step()).message
    assert client.call(run.run_id, 4, loss_pass()).status == "completed"  # the batch was dropped, and its form
    assert "not of both" in error_of(client, run.run_id, 5, batch()).message
    assert client.call(run.run_id, 6, batch(train=False)).status == "completed"  # to look is no part of it


def test_a_pass_that_cannot_be_read_takes_its_turn_and_spoils_the_batch(client: RawClient) -> None:
    run = client.create(CONFIG)
    assert client.call(run.run_id, 1, loss_pass()).status == "completed"
    request = call_to_proto(loss_pass(), Position(run_id=run.run_id, seq=2))
    request.datums.append(b"garbage")  # type: ignore[attr-defined]
    client.send(request)
    assert isinstance(client.wait(run.run_id, 2).error, InvalidRequestError)
    assert "incomplete" in error_of(client, run.run_id, 3, Step()).message


def wide(columns: int) -> TensorData:
    rows = 6
    return TensorData([1.0], "float32", [rows, columns], sparse_crow_indices=[0, *[1] * rows], sparse_col_indices=[0])


REFUSED = {
    "no datums": (LossPass(data=(), loss=CROSS_ENTROPY), "data"),
    "a datum without tokens": (loss_pass(datum(0)), "data"),
    "a datum over the run's length": (loss_pass(datum(65)), "data"),
    "units that are not one for each": (loss_pass(units=("a",)), "privacy_unit_ids"),
    "a tensor that only announces its size": (loss_pass(datum(extra=wide(2**40))), "loss_fn_inputs.extra"),
    "ids beyond the vocabulary": (
        loss_pass(Datum(ModelInput.from_ints([10**6]), {"target_tokens": [1], "weights": [1.0]})),
        None,
    ),
    "targets beyond the vocabulary": (
        loss_pass(Datum(ModelInput.from_ints([1]), {"target_tokens": [10**6], "weights": [1.0]})),
        None,
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_pass_can_take_is_refused_by_name(client: RawClient, case: str) -> None:
    run = client.create(CONFIG)
    call, field = REFUSED[case]
    error = error_of(client, run.run_id, 1, call)
    assert isinstance(error, InvalidRequestError)
    assert field is None or error.field == field


def test_limits_of_a_call_are_of_datums_and_of_their_own_tokens(tmp_path: Any) -> None:
    config = ServerConfig(
        port=0, backend="bigram", data_dir=tmp_path / "data", max_batch_records=3, max_batch_tokens=20
    )
    with EmbeddedServer(config) as server:
        client = RawClient(server.address, server.mint_key())
        run = client.create(CONFIG)
        assert "4 records" in error_of(client, run.run_id, 1, loss_pass(*[datum(1, n) for n in range(4)])).message
        assert "21 tokens" in error_of(client, run.run_id, 2, loss_pass(datum(18), datum(3, 1))).message
        fits = loss_pass(datum(18), datum(1, 1), datum(1, 2))  # padded it would be 54
        assert client.call(run.run_id, 3, fits).status == "completed"


@pytest.mark.parametrize("name", [n for n, kind in LOSSES.items() if kind.coupling == "group"])
def test_a_loss_that_couples_a_group_needs_the_group_as_its_unit(client: RawClient, name: str) -> None:
    loss = Loss.of(name)
    data = (datum(3, 0, name), datum(4, 1, name))
    for unit in ("datum", "sequence"):
        run = client.create(private(privacy_unit=unit, dataset_id=unit))
        error = error_of(client, run.run_id, 1, loss_pass(*data, loss=loss, units=("a", "b")))
        assert isinstance(error, DPUnsupportedError)
        assert "privacy_unit='group'" in error.message or "group" in str(error.details)
        looked = client.call(run.run_id, 2, loss_pass(*data, loss=loss, train=False))
        assert looked.status == "completed"  # to evaluate releases nothing
    run = client.create(private(privacy_unit="group"))
    assert error_of(client, run.run_id, 1, loss_pass(*data, loss=loss)).code
    assert client.call(run.run_id, 2, loss_pass(*data, loss=loss, units=("g", "g"))).status == "completed"
    run = client.create(CONFIG)
    assert client.call(run.run_id, 1, loss_pass(*data, loss=loss)).status == "completed"


def test_inputs_across_units_are_refused_in_private_whatever_the_loss(client: RawClient) -> None:
    run = client.create(private(privacy_unit="group"))
    coupled = loss_pass(units=("a", "b"), coupling="batch")
    assert isinstance(error_of(client, run.run_id, 1, coupled), DPUnsupportedError)
    run = client.create(CONFIG)
    assert client.call(run.run_id, 1, coupled).status == "completed"


def test_no_model_work_for_what_cannot_be_paid(client: RawClient, monkeypatch: pytest.MonkeyPatch) -> None:
    from tg_tinker_server.engine import bigram

    # Two steps at this noise cost more than the target, one does not.
    run = client.create(private(target_epsilon=6.0, noise_multiplier=1.0))
    seq = 1
    while (stepped := client.call(run.run_id, seq, loss_pass())).status == "completed":
        assert client.call(run.run_id, seq + 1, Step()).status == "completed"
        seq += 2
    assert seq > 1
    assert isinstance(stepped.error, DPBudgetExceededError)
    called: list[int] = []
    session = next(c for c in vars(bigram).values() if hasattr(c, "forward_backward") and hasattr(c, "start"))
    monkeypatch.setattr(session, "start", lambda *_: called.append(1))
    assert isinstance(error_of(client, run.run_id, seq + 1, loss_pass()), DPBudgetExceededError)
    assert not called


def test_a_repeated_request_is_one_pass_and_a_changed_one_is_refused(client: RawClient) -> None:
    run = client.create(CONFIG)
    for _ in range(2):
        client.send(call_to_proto(loss_pass(), Position(run_id=run.run_id, seq=1)))
    with pytest.raises(InvalidRequestError, match="different request"):
        client.send(call_to_proto(loss_pass(datum()), Position(run_id=run.run_id, seq=1)))
    assert client.call(run.run_id, 2, Save()).status == "completed"


def test_a_custom_loss_must_be_the_tenants_own(client: RawClient) -> None:
    run = client.create(CONFIG)
    custom = Loss.of("custom", {"loss_id": "loss_" + "0" * 24})
    assert isinstance(error_of(client, run.run_id, 1, loss_pass(loss=custom)), ResourceNotFoundError)
    with pytest.raises(InvalidRequestError, match="bigram"):  # and this backend computes none
        client.send(training_pb2.CreateCustomLossRequest(graph_json="{}"))


def test_a_counted_run_knows_a_record_by_one_kind_of_name(client: RawClient) -> None:
    """Under a second kind of name the same record would have turns of its own, which nobody paid for."""
    ways: dict[str, Any] = {
        "datum": loss_pass(datum()),
        "datum by id": loss_pass(datum(), units=("ab",)),
        "batch": batch(records=1),
        "batch by id": replace(batch(records=1), units=("ab",)),
    }
    for first, second, same in (
        ("datum", "datum by id", False),
        ("datum by id", "datum", False),
        ("batch", "datum", False),
        ("datum", "batch", False),
        ("batch", "batch by id", False),
        ("datum by id", "batch by id", True),
        ("batch", "batch", True),
    ):
        run = client.create(private(dataset_id=first + second, sampling="max_participation", max_participation=2))
        results = [
            client.call(run.run_id, seq, call)
            for seq, call in enumerate((ways[first], Step(), ways[second], Step()), 1)
        ]
        assert [r.status for r in results[:3]] == ["completed"] * 3
        spent = [r.result.dp_metrics.total_epsilon for r in results[1::2] if r.result is not None]
        if same:
            assert spent[1] > spent[0]
        else:
            assert "two names" in str(results[3].error)

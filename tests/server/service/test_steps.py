"""optim_step: Adam per step, and what a step costs, through the real server and the NumPy model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tests.server.rpc.raw_client import RawClient, batch
from tests.server.service.datum_calls import CONFIG, datum, error_of, loss_pass, private
from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import OptimizerConfig
from tg_tinker.types.datum import Datum
from tg_tinker.types.optim import AdamParams
from tg_tinker.wire.calls import Step


def test_units_that_are_counted_may_be_known_by_content(client: RawClient) -> None:
    """Equal records share one count, so that it bounds each of theirs from above."""
    run = client.create(private(sampling="max_participation", max_participation=2))
    one, same, other = datum(), datum(), datum(4, 1)

    def step(seq: int, *data: Datum) -> Any:
        assert client.call(run.run_id, seq, loss_pass(*data)).status == "completed"
        return client.call(run.run_id, seq + 1, Step())

    assert step(1, one).status == "completed"
    assert step(3, same, other).status == "completed"
    refused = step(5, one)
    assert refused.status == "failed"
    assert "2" in refused.error.message
    # Batches of the dict form are counted in the same way.
    ids = client.create(private(sampling="max_participation", max_participation=1, dataset_id="others"))
    assert client.call(ids.run_id, 1, batch()).status == "completed"
    assert client.call(ids.run_id, 2, Step()).status == "completed"
    assert client.call(ids.run_id, 3, batch()).status == "completed"
    assert client.call(ids.run_id, 4, Step()).status == "failed"


def test_adam_of_a_step_comes_before_the_schedule(client: RawClient) -> None:
    run = client.create(CONFIG)
    client.call(run.run_id, 1, loss_pass())
    result: Any = client.call(run.run_id, 2, Step(adam=AdamParams(learning_rate=0.25))).result
    assert result.learning_rate == 0.25
    client.call(run.run_id, 3, loss_pass())
    result = client.call(run.run_id, 4, Step()).result
    assert result.learning_rate == CONFIG.optimizer.learning_rate
    assert set(result.metrics) == {"unclipped_grad_norm"}


def test_a_learning_rate_of_zero_and_a_clip_are_obeyed(client: RawClient) -> None:
    run = client.create(CONFIG.model_copy(update={"optimizer": OptimizerConfig(max_grad_norm=1e-6)}))
    weights = []
    for seq, adam in ((1, AdamParams(learning_rate=0.0)), (4, AdamParams(learning_rate=0.1, grad_clip_norm=1e-9))):
        client.call(run.run_id, seq, loss_pass())
        assert client.call(run.run_id, seq + 1, Step(adam=adam)).status == "completed"
        seen: Any = client.call(run.run_id, seq + 2, loss_pass(train=False)).result
        weights.append(seen.loss_fn_outputs[0]["logprobs"].to_numpy())
    fresh = client.create(CONFIG)
    first: Any = client.call(fresh.run_id, 1, loss_pass(train=False)).result
    assert np.array_equal(weights[0], first.loss_fn_outputs[0]["logprobs"].to_numpy())
    assert not np.array_equal(weights[1], weights[0])


def test_adam_is_refused_where_the_optimizer_is_another(client: RawClient) -> None:
    run = client.create(CONFIG.model_copy(update={"optimizer": OptimizerConfig(name="sgd")}))
    client.call(run.run_id, 1, loss_pass())
    error = error_of(client, run.run_id, 2, Step(adam=AdamParams()))
    assert isinstance(error, InvalidRequestError)
    assert error.field == "adam_params"
    assert client.call(run.run_id, 3, Step()).status == "completed"  # nothing was lost


def test_what_a_step_cost_lands_among_its_metrics(client: RawClient) -> None:
    run = client.create(private(noise_multiplier=2.0, diagnostics="off"))
    totals = [0.0]
    for seq in (1, 3):
        passed: Any = client.call(run.run_id, seq, loss_pass()).result
        before = {k: v for k, v in passed.metrics.items() if k.startswith("privacy/")}
        assert before.pop("privacy/epsilon:max") == pytest.approx(totals[-1])
        assert before == {"privacy/delta:max": 1e-5, "privacy/target_epsilon:max": 1000.0}
        result: Any = client.call(run.run_id, seq + 1, Step()).result
        dp = result.dp_metrics
        assert {k: v for k, v in result.metrics.items() if k.startswith("privacy/")} == {
            "privacy/epsilon": dp.total_epsilon,
            "privacy/epsilon_spent": dp.epsilon_spent,
            "privacy/delta": 1e-5,
            "privacy/noise_multiplier": 2.0,
            "privacy/target_epsilon": 1000.0,
        }
        assert dp.epsilon_spent == pytest.approx(dp.total_epsilon - totals[-1])
        totals.append(dp.total_epsilon)
    assert totals[2] > totals[1] > 0
    run = client.create(private(dataset_id="open", target_epsilon=None, allow_unnoised_steps=True))
    client.call(run.run_id, 1, loss_pass())
    result = client.call(run.run_id, 2, Step(apply_dp_noise=False)).result
    assert result.metrics["privacy/epsilon"] == math.inf
    assert result.metrics["privacy/noise_multiplier"] == 0.0
    assert "privacy/target_epsilon" not in result.metrics
    passed = client.call(run.run_id, 3, loss_pass()).result
    assert passed.metrics["privacy/epsilon:max"] == math.inf
    assert "privacy/target_epsilon:max" not in passed.metrics
    assert not any(
        k.startswith("privacy/") for k in client.call(run.run_id, 4, loss_pass(train=False)).result.metrics
    )

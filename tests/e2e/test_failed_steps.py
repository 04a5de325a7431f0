"""A refused step stays refused after a restart, and what it left behind is what a calm run would have."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.forked_server import ForkedServer
from tests.e2e.server_process import batch
from tg_tinker import DPBudgetExceededError, DPConfig, InvalidRequestError, OptimizerConfig, TrainingConfig


def test_a_refused_step_is_not_executed_again_by_a_new_server(tmp_path: Path) -> None:
    config = TrainingConfig(model_ref="bigram", optimizer=OptimizerConfig(learning_rate=0.05), batch_size=4, seed=7)
    with ForkedServer(tmp_path) as server, server.client(timeout=60) as service:
        client = service.create_training_client(config)
        client.forward_backward(batch(1)).result()
        bad = client.forward_backward({"input_ids": [[999_999, 1]]})
        refused = client.optim_step()
        with pytest.raises(InvalidRequestError):
            bad.result()
        with pytest.raises(InvalidRequestError, match="incomplete"):
            refused.result()
        client.forward_backward(batch(2)).result()
        server.kill()
        server.start().wait_until_up()
        assert client.optim_step().result(timeout=60).step == 1
        assert client.step == 1
        after_kill = client.forward_backward(batch(3)).result().loss
        calm = service.create_training_client(config)
        calm.forward_backward(batch(2)).result()
        calm.optim_step().result()
        assert calm.forward_backward(batch(3)).result().loss == after_kill


def test_a_step_over_budget_keeps_its_batch_and_its_refusal_through_a_restart(tmp_path: Path) -> None:
    dp = DPConfig(noise_multiplier=1.0, target_epsilon=6.0, dataset_id="data-1")
    config = TrainingConfig(model_ref="bigram", dp_config=dp, batch_size=4)
    with ForkedServer(tmp_path) as server, server.client(timeout=60) as service:
        client = service.create_training_client(config)
        pending = client.forward_backward(batch(0))
        client.optim_step().result()
        second = client.forward_backward(batch(1))
        with pytest.raises(DPBudgetExceededError):
            second.result()
        with pytest.raises((DPBudgetExceededError, InvalidRequestError)):
            client.optim_step().result()
        spent = client.privacy.total_epsilon
        server.kill()
        server.start().wait_until_up()
        assert client.save_state().artifact_id
        assert client.privacy.total_epsilon == spent
        assert client.step == 1
        assert pending.result().num_tokens == 48

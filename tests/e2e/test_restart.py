"""A server that is killed and started again: the script notices a pause and nothing else."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.forked_server import ForkedServer
from tests.e2e.server_process import ServerProcess, batch
from tg_tinker import DPConfig, OptimizerConfig, TrainingConfig

STEPS = 40


def config(dp: DPConfig | None) -> TrainingConfig:
    return TrainingConfig(
        model_ref="bigram", optimizer=OptimizerConfig(learning_rate=0.05), dp_config=dp, batch_size=4, seed=7
    )


def train(server: ServerProcess, dp: DPConfig | None, steps: int = STEPS, pause_s: float = 0.0) -> list[float]:
    with server.client(timeout=120) as service:
        client = service.create_training_client(config(dp))
        losses = []
        for step in range(steps):
            futures = [client.forward_backward(batch(2 * step + half)) for half in (0, 1)]
            done = client.optim_step()
            losses += [f.result(timeout=120).loss for f in futures]
            assert done.result(timeout=120).step == step + 1
            time.sleep(pause_s)
        assert client.step == steps
    return losses


def kill_and_restart(server: ServerProcess, times: int, stop: threading.Event, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(times):
        if stop.wait(rng.uniform(0.05, 0.6)):
            return
        server.kill()
        server.start().wait_until_up()


def train_under_fire(server: ServerProcess, dp: DPConfig | None, kills: int) -> list[float]:
    stop = threading.Event()
    fire = threading.Thread(target=kill_and_restart, args=(server, kills, stop, 11))
    fire.start()
    try:
        losses = train(server, dp, pause_s=0.25)
    finally:
        fire.join(timeout=300)
        stop.set()
    return losses


def test_ten_kills_leave_the_losses_of_a_seeded_run_as_they_were(tmp_path: Path) -> None:
    calm, wild = tmp_path / "calm", tmp_path / "wild"
    calm.mkdir()
    wild.mkdir()
    with ForkedServer(calm) as server:
        expected = train(server, None)
    with ForkedServer(wild) as server:
        assert train_under_fire(server, None, kills=10) == expected


def test_ten_kills_cost_at_most_one_charge_each_and_never_too_little(tmp_path: Path) -> None:
    dp = DPConfig(noise_multiplier=2.0, target_epsilon=500.0, dataset_id="data-1")
    with ForkedServer(tmp_path) as server:
        train_under_fire(server, dp, kills=10)
        with server.client() as service:
            ledger = service.get_privacy_ledger("data-1")
    ledger.verify()
    charges = [e for e in ledger.entries if e.kind == "charge"]
    releases = [e for e in ledger.entries if e.kind == "settle"]
    assert len(releases) == STEPS
    assert STEPS <= len(charges) <= STEPS + 10


@pytest.mark.parametrize("signal", ["terminate", "kill"])
def test_results_can_be_fetched_after_a_restart(tmp_path: Path, signal: str) -> None:
    with ServerProcess(tmp_path) as server, server.client(timeout=60) as service:
        client = service.create_training_client(config(None))
        first = client.forward_backward(batch(1))
        step = client.optim_step()
        loss = first.result(timeout=60).loss
        step.result(timeout=60)
        getattr(server, signal)()
        server.start().wait_until_up()
        assert service.get_future(first.id).result(timeout=60).loss == loss
        assert service.get_future(step.id).result(timeout=60).step == 1
        assert service.get_training_client(client.id).step == 1


def test_a_kill_leaves_the_vector_of_a_run_on_updates_as_it_would_have_been(tmp_path: Path) -> None:
    plain = OptimizerConfig(name="sgd", learning_rate=0.5, momentum=0.0, nesterov=False)
    vectors = np.random.default_rng(4).normal(size=(12, 2, 5)).astype(np.float32)
    with ForkedServer(tmp_path) as server, server.client(timeout=120) as service:
        tc = service.create_training_client(TrainingConfig(model_ref="vector:5", optimizer=plain))
        steps = []
        for i, rows in enumerate(vectors):
            tc.add_updates(rows[:1], ["a"])
            if i == 5:
                server.kill()
                server.start().wait_until_up()
            tc.add_updates(rows[1:], ["b"])
            steps.append(tc.optim_step())
        assert [s.result(timeout=120).step for s in steps] == list(range(1, 13))
        moved = -sum(0.5 * rows.astype(np.float64).mean(axis=0) for rows in vectors)
        again = service.create_training_client(
            TrainingConfig(model_ref="vector:5", optimizer=plain), checkpoint_id=tc.save_state().artifact_id
        )
        assert again.step == 12
        np.testing.assert_allclose(again.pull_weights().tensors["vector"], moved, atol=1e-5)

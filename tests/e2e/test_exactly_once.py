"""Lost replies and kills inside optim_step: charged before released, charged once, drawn once."""

from __future__ import annotations

import random
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.forked_server import ForkedServer
from tests.server.rpc.raw_client import RawClient, batch
from tg_tinker.ledger import PrivacyLedger
from tg_tinker.proto.v1 import privacy_pb2, runs_pb2
from tg_tinker.types import DPConfig, OptimizerConfig, TrainingConfig
from tg_tinker.wire.call_messages import call_to_proto
from tg_tinker.wire.calls import Position, Step
from tg_tinker.wire.methods import method_of
from tg_tinker.wire.operations import resume_request
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.artifacts.vault import Vault
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.dp.rng import SecureNormal

CONFIG = TrainingConfig(
    model_ref="bigram",
    optimizer=OptimizerConfig(learning_rate=0.01),
    dp_config=DPConfig(dataset_id="data-1", noise_multiplier=5.0, target_epsilon=1e6),
    batch_size=2,
)


def ledger_of(client: RawClient) -> PrivacyLedger:
    reply = client.send(privacy_pb2.GetLedgerRequest(dataset_id="data-1"))
    ledger = PrivacyLedger.from_lines(
        "data-1", reply.entries_json, epsilon_spent=reply.epsilon_spent, target_epsilon=1e6, delta=reply.delta
    )
    ledger.verify()
    return ledger


def drop_the_reply(client: RawClient, request: Any, payload: bytes) -> None:
    """Send, and hang up before the answer can come."""
    call = client.channel.unary_unary(method_of(type(request)).path).future(payload, metadata=client.metadata)
    call.cancel()


def test_a_thousand_retried_steps_with_dropped_replies_are_charged_and_drawn_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = 0
    original = SecureNormal.normals

    def counted(self: SecureNormal, count: int) -> Any:
        nonlocal draws
        draws += 1
        return original(self, count)

    monkeypatch.setattr(SecureNormal, "normals", counted)
    rng = random.Random(3)
    steps, retries = 250, 0
    with EmbeddedServer(ServerConfig(port=0, backend="bigram", data_dir=tmp_path)) as server:
        client = RawClient(server.address, server.mint_key())
        run_id = client.create(CONFIG).run_id
        for step in range(1, steps + 1):
            client.call(run_id, 2 * step - 1, batch(step, records=2))
            request = call_to_proto(Step(), Position(run_id=run_id, seq=2 * step))
            payload = request.SerializeToString()
            for _ in range(4):
                drop_the_reply(client, request, payload)
                time.sleep(rng.uniform(0, 0.002))
                retries += 1
            client.send(request, payload)
            assert client.wait(run_id, 2 * step).result.step == step
        ledger = ledger_of(client)
    assert retries == 1000
    assert len(ledger.charges) == steps
    assert draws == steps
    settled = [e for e in ledger.entries if e.kind == "settle"]
    assert len({e.body["update_hash"] for e in settled}) == len(settled) == steps


def kill_during_steps(folder: Path, kills: int) -> tuple[int, int, int]:
    """Step without pause, SIGKILL at random moments; returns releases, charges and steps in the end."""
    rng = random.Random(17)
    with ForkedServer(folder) as server:
        client = RawClient(f"127.0.0.1:{server.port}", server.key)
        run_id = client.create(CONFIG).run_id
        for _ in range(kills):
            deadline = time.monotonic() + rng.uniform(0.02, 0.25)
            while time.monotonic() < deadline:
                info = client.send(runs_pb2.GetTrainingClientRequest(run_id=run_id))
                client.call(run_id, info.next_seq, batch(info.next_seq, records=2))
                request = call_to_proto(Step(), Position(run_id=run_id, seq=info.next_seq + 1))
                client.send(request)
                time.sleep(rng.uniform(0, 0.004))  # somewhere inside the step
                if time.monotonic() < deadline:
                    client.wait(run_id, info.next_seq + 1)
            server.kill()
            server.start().wait_until_up()
            client = RawClient(f"127.0.0.1:{server.port}", server.key)
            info = client.send(runs_pb2.GetTrainingClientRequest(run_id=run_id))
            answer = client.send(resume_request(run_id, []))
            client.send(resume_request(run_id, range(answer.expected_seq, info.next_seq)))
            ledger = ledger_of(client)
            releases = sum(1 for e in ledger.entries if e.kind == "settle")
            assert info.step == releases <= len(ledger.charges)
    return releases, len(ledger.charges), info.step


def test_kills_inside_a_step_never_leave_a_release_uncharged(tmp_path: Path) -> None:
    releases, charges, steps = kill_during_steps(tmp_path, kills=8)
    assert steps == releases <= charges <= releases + 8


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_hundred_kills_inside_a_step_never_leave_a_release_uncharged(tmp_path: Path) -> None:
    releases, charges, steps = kill_during_steps(tmp_path, kills=200)
    print(f"200 kills: {releases} releases, {charges} charges, {steps} steps")
    assert steps == releases <= charges <= releases + 200


def test_the_charge_is_on_disk_before_noise_and_the_state_before_the_settlement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, list[str]]] = []

    def kinds() -> list[str]:
        with sqlite3.connect(tmp_path / "tg-tinker.db") as db:  # another connection sees what is committed only
            return [kind for (kind,) in db.execute("select kind from ledger order by position")]

    draw, seal = SecureNormal.normals, Vault.seal

    def watched_draw(self: SecureNormal, count: int) -> Any:
        seen.append(("noise", kinds()))
        return draw(self, count)

    def watched_seal(self: Vault, **values: Any) -> Any:
        sealed = seal(self, **values)
        seen.append(("state", kinds()))
        return sealed

    with EmbeddedServer(ServerConfig(port=0, backend="bigram", data_dir=tmp_path)) as server:
        client = RawClient(server.address, server.mint_key())
        run_id = client.create(CONFIG).run_id
        client.call(run_id, 1, batch(1, records=2))
        monkeypatch.setattr(SecureNormal, "normals", watched_draw)
        monkeypatch.setattr(Vault, "seal", watched_seal)
        assert client.call(run_id, 2, Step()).result.step == 1
    assert seen == [("noise", ["open", "charge"]), ("state", ["open", "charge"])]
    assert kinds() == ["open", "charge", "settle"]

"""Failures in the middle of an operation: nothing is half-done, and the session goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import structlog

from tests.server.rpc.raw_client import RawClient, batch
from tg_tinker.errors import (
    AuthorizationError,
    DPUnsupportedError,
    InvalidRequestError,
    RateLimitedError,
    ServerError,
    TGTinkerError,
)
from tg_tinker.proto.v1 import artifacts_pb2, privacy_pb2, runs_pb2
from tg_tinker.types import BatchData, DPConfig, TrainingConfig
from tg_tinker.wire.call_messages import call_to_proto
from tg_tinker.wire.calls import Generate, Load, Pass, Position, Save, Step
from tg_tinker.wire.operations import cancel_future_request, resume_request
from tg_tinker.wire.privacy import report_of
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.artifacts.blobs import LocalBlobs
from tg_tinker_server.artifacts.vault import Vault
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.engine.bigram import BigramSession
from tg_tinker_server.store.database import Database

CONFIG = TrainingConfig(model_ref="bigram", batch_size=4, seed=1)


def private(**settings: object) -> TrainingConfig:
    dp = DPConfig(**{"dataset_id": "d", "target_epsilon": 1e6, **settings})  # type: ignore[arg-type]
    return CONFIG.model_copy(update={"dp_config": dp})


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    config = ServerConfig(port=0, backend="bigram", data_dir=tmp_path / "data", max_runs_per_tenant=5)
    with EmbeddedServer(config) as running:
        yield running


@pytest.fixture
def client(server: EmbeddedServer) -> RawClient:
    return RawClient(server.address, server.mint_key("tenant-a"))


def loss(client: RawClient, run_id: str, seq: int) -> float:
    return client.call(run_id, seq, batch(1, train=False)).result.loss


def broken(error: Exception) -> Any:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def test_a_pass_that_crashed_makes_the_step_fail(client: RawClient, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = client.create(CONFIG).run_id
    client.call(run_id, 1, batch(1))
    with monkeypatch.context() as patch:
        patch.setattr(BigramSession, "_compute", broken(MemoryError("secret text")))
        crashed = client.call(run_id, 2, batch(2))
    assert isinstance(crashed.error, ServerError)
    assert "secret" not in str(crashed.error)
    assert isinstance(client.call(run_id, 3, Step()).error, InvalidRequestError)
    client.call(run_id, 4, batch(3))
    assert client.call(run_id, 5, Step()).result.step == 1


def test_a_pass_that_cannot_be_read_makes_the_step_fail(client: RawClient) -> None:
    run_id = client.create(CONFIG).run_id
    client.call(run_id, 1, batch(1))
    unreadable = call_to_proto(batch(2), Position(run_id=run_id, seq=2))
    unreadable.attention_mask.CopyFrom(unreadable.input_ids)
    client.send(unreadable)
    assert client.wait(run_id, 2).status == "failed"
    assert isinstance(client.call(run_id, 3, Step()).error, InvalidRequestError)


def test_a_step_whose_old_snapshot_stays_is_a_step(client: RawClient, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = client.create(CONFIG).run_id
    client.call(run_id, 1, batch(1))
    with monkeypatch.context() as patch:
        patch.setattr(Vault, "delete", broken(ServerError("input/output error")))
        assert client.call(run_id, 2, Step()).result.step == 1


@pytest.mark.parametrize("config", [CONFIG, private()], ids=["plain", "private"])
def test_the_answer_to_a_step_that_crashed_leads_to_its_line_in_the_log(
    client: RawClient, monkeypatch: pytest.MonkeyPatch, config: TrainingConfig
) -> None:
    run_id = client.create(config).run_id
    client.call(run_id, 1, batch(1))
    with monkeypatch.context() as patch, structlog.testing.capture_logs() as lines:
        patch.setattr(BigramSession, "_apply", broken(KeyError("secret text")))
        error = client.call(run_id, 2, Step()).error
    (line,) = [found for found in lines if found["event"] == "operation_crashed"]
    assert (line["operation"], line["error"]) == ("optim_step", "KeyError")
    assert __file__ in line["at"]
    assert f"reference {line['reference']}" in str(error)
    assert "secret" not in str(line) + str(error)


def report_on(client: RawClient, dataset_id: str) -> dict[str, Any]:
    envelope = client.send(privacy_pb2.GetPrivacyReportRequest(dataset_id=dataset_id)).report_json
    return report_of(envelope.encode())


@pytest.mark.parametrize("config", [CONFIG, private()], ids=["plain", "private"])
def test_a_full_disk_fails_the_step_and_nothing_moved(
    client: RawClient, monkeypatch: pytest.MonkeyPatch, config: TrainingConfig
) -> None:
    run_id = client.create(config).run_id
    before = loss(client, run_id, 1)
    client.call(run_id, 2, batch(2))
    with monkeypatch.context() as patch:
        patch.setattr(LocalBlobs, "_write", broken(OSError(28, "No space left on device")))
        assert isinstance(client.call(run_id, 3, Step()).error, TGTinkerError)
    assert loss(client, run_id, 4) == before
    assert client.send(runs_pb2.GetTrainingClientRequest(run_id=run_id)).step == 0
    client.call(run_id, 5, batch(2))
    assert client.call(run_id, 6, Step()).result.step == 1
    if config.private:
        (run,) = report_on(client, "d")["coverage"]["runs"]
        assert (run["charged"], run["failed"], run["released"]) == (2, 1, 1)


def test_a_full_disk_fails_the_load_and_nothing_moved(client: RawClient, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = client.create(CONFIG).run_id
    saved = client.call(run_id, 1, Save()).result
    client.call(run_id, 2, batch(2))
    client.call(run_id, 3, Step())
    before = loss(client, run_id, 4)
    with monkeypatch.context() as patch:
        patch.setattr(LocalBlobs, "_write", broken(OSError(28, "No space left on device")))
        assert client.call(run_id, 5, Load(artifact_id=saved.artifact_id)).status == "failed"
    assert loss(client, run_id, 6) == before
    assert client.send(runs_pb2.GetTrainingClientRequest(run_id=run_id)).step == 1


def test_weights_that_cannot_be_taken_back_are_shown_to_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ServerConfig(port=0, backend="bigram", data_dir=tmp_path / "data")
    with EmbeddedServer(folder) as server:
        key = server.mint_key("tenant-a")
        client = RawClient(server.address, key)
        run_id = client.create(CONFIG).run_id
        client.call(run_id, 1, batch(1))
        with monkeypatch.context() as patch:
            patch.setattr(LocalBlobs, "_write", broken(OSError(5, "Input/output error")))
            patch.setattr(LocalBlobs, "read", broken(ServerError("input/output error")))
            assert client.call(run_id, 2, Step()).status == "failed"
        for seq, call in ((3, Generate(prompts=("a",))), (4, Save()), (5, batch(2))):
            assert "restart the server" in str(client.call(run_id, seq, call).error)
        assert client.send(runs_pb2.GetTrainingClientRequest(run_id=run_id)).status == "failed"
    with EmbeddedServer(folder) as server:
        client = RawClient(server.address, key)
        info = client.send(runs_pb2.GetTrainingClientRequest(run_id=run_id))
        assert (info.status, info.step) == ("active", 0)


def test_a_save_is_cancelled_before_it_begins_or_not_at_all(
    client: RawClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = client.create(CONFIG).run_id
    write = Database.write

    def slow(self: Database, fn: Any) -> Any:
        time.sleep(0.3)
        return write(self, fn)

    with monkeypatch.context() as patch:
        patch.setattr(Database, "write", slow)
        client.send(call_to_proto(Save(), Position(run_id=run_id, seq=1)))
        time.sleep(0.15)
        assert not client.send(cancel_future_request(Position(run_id=run_id, seq=1))).cancelled
        assert client.wait(run_id, 1).status == "completed"
    assert len(client.send(artifacts_pb2.ListArtifactsRequest()).artifacts) == 1
    client.call(run_id, 2, batch(2))
    assert client.call(run_id, 3, Step()).result.step == 1


def test_parallel_creates_keep_the_limit(server: EmbeddedServer) -> None:
    key = server.mint_key("tenant-a")

    def create(number: int) -> bool:
        try:
            RawClient(server.address, key).create(CONFIG, request_id=f"c{number}")
        except RateLimitedError:
            return False
        return True

    with ThreadPoolExecutor(20) as pool:
        assert sum(pool.map(create, range(20))) == 5


def test_a_deleted_run_does_not_come_back_while_its_last_pass_ends(
    client: RawClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = client.create(CONFIG).run_id
    work = BigramSession._compute

    def slow(self: BigramSession, request: Any) -> Any:
        time.sleep(0.5)
        return work(self, request)

    monkeypatch.setattr(BigramSession, "_compute", slow)
    client.send(call_to_proto(batch(1), Position(run_id=run_id, seq=1)))
    with ThreadPoolExecutor(1) as pool:
        deleting = pool.submit(client.send, runs_pb2.DeleteTrainingClientRequest(run_id=run_id))
        time.sleep(0.2)
        with pytest.raises(InvalidRequestError, match="unloaded"):
            client.send(call_to_proto(batch(2), Position(run_id=run_id, seq=2)))
        deleting.result()
    assert client.send(runs_pb2.ListTrainingClientsRequest()).runs == []


def test_one_folder_has_one_server(server: EmbeddedServer, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="another server uses"):
        EmbeddedServer(ServerConfig(port=0, backend="bigram", data_dir=tmp_path / "data")).start()


def test_results_and_keys_are_for_those_who_train(server: EmbeddedServer, client: RawClient) -> None:
    info = client.create(private(diagnostics="owner"))
    client.call(info.run_id, 1, batch(1))
    assert len(info.unit_key) == 32
    for role in ("auditor", "sampler", "exporter", "budget_officer", "admin"):
        other = RawClient(server.address, server.mint_key("tenant-a", (role,)))
        with pytest.raises(AuthorizationError):
            other.wait(info.run_id, 1)
        assert other.send(runs_pb2.GetTrainingClientRequest(run_id=info.run_id)).unit_key == b""


def test_weights_of_unknown_privacy_do_not_enter_a_private_run(client: RawClient) -> None:
    plain = client.create(CONFIG).run_id
    saved = client.call(plain, 1, Save()).result.artifact_id
    guarded = client.create(private()).run_id
    refused = client.call(guarded, 1, Load(artifact_id=saved)).error
    assert isinstance(refused, DPUnsupportedError)
    assert "initial_weights" in refused.alternative
    attested = client.create(private(dataset_id="e", initial_weights="public")).run_id
    assert client.call(attested, 1, Load(artifact_id=saved)).status == "completed"
    laundered = client.call(attested, 2, Save()).result.artifact_id
    assert isinstance(client.call(guarded, 2, Load(artifact_id=laundered)).error, DPUnsupportedError)
    assert "public by the client's word" in json.dumps(report_on(client, "e"))


def test_a_batch_no_poisson_draw_would_make_is_refused(client: RawClient) -> None:
    config = private(sampling="poisson", dataset_size=1000).model_copy(update={"batch_size": 1})
    run_id = client.create(config).run_id
    ids = BatchData(input_ids=[[1, n % 200, n // 200] for n in range(300)])
    client.call(run_id, 1, Pass(batch=ids))
    assert "one draw per optim_step" in str(client.call(run_id, 2, Step()).error)
    client.call(run_id, 3, batch(1, records=2))
    assert client.call(run_id, 4, Step()).result.step == 1


def test_the_hash_of_an_exact_update_is_keyed(client: RawClient) -> None:
    config = private(target_epsilon=None, allow_unnoised_steps=True)
    run_id = client.create(config).run_id
    client.call(run_id, 1, batch(1))
    client.call(run_id, 2, Step(apply_dp_noise=False))
    client.call(run_id, 3, batch(1))
    client.call(run_id, 4, Step())
    lines = client.send(privacy_pb2.GetLedgerRequest(dataset_id="d")).entries_json
    hashes = [line.split('"update_hash":"')[1].split(":")[0] for line in lines if '"settle"' in line]
    assert hashes == ["hmac-sha256", "sha256"]


def test_no_text_of_a_user_is_readable_in_the_data_folder(server: EmbeddedServer, tmp_path: Path) -> None:
    client = RawClient(server.address, server.mint_key("tenant-a"))
    config = private(privacy_unit="user").model_copy(update={"metadata": {"note": "canary-config"}})
    run_id = client.create(config).run_id
    data = BatchData(input_ids=[list(b"canary-batch")])
    client.call(run_id, 1, Pass(batch=data, units=("canary-unit",), batch_hash="canary-label"))
    client.call(run_id, 2, Generate(prompts=("canary-prompt",)))
    client.call(run_id, 3, Step())
    client.call(run_id, 4, Save(metadata={"note": "canary-metadata"}, name="canary-name"))
    (listed,) = client.send(artifacts_pb2.ListArtifactsRequest()).artifacts
    assert listed.name == "canary-name"
    assert "canary-config" in client.send(runs_pb2.ListTrainingClientsRequest()).runs[0].config_json
    files = [p for p in (tmp_path / "data").rglob("*") if p.is_file()]
    assert len(files) > 3
    for path in files:
        assert b"canary" not in path.read_bytes(), path
        assert path.stat().st_mode & 0o077 == 0 or path.suffix == ".lock", path


def test_what_has_no_effect_is_durable_as_soon_as_it_ends(tmp_path: Path) -> None:
    folder = ServerConfig(port=0, backend="bigram", data_dir=tmp_path / "data", kept_results=10)
    with EmbeddedServer(folder) as server:
        key = server.mint_key("tenant-a")
        client = RawClient(server.address, key)
        run_id = client.create(CONFIG).run_id
        texts = [client.call(run_id, seq, Generate(prompts=(f"p{seq}",))).result for seq in range(1, 31)]
    with EmbeddedServer(folder) as server:
        client = RawClient(server.address, key)
        assert client.wait(run_id, 30).result == texts[-1]
        assert client.wait(run_id, 1).status == "unknown"  # beyond the ten that are kept


def test_positions_far_beyond_and_positions_passed_over_are_refused(client: RawClient) -> None:
    run_id = client.create(CONFIG).run_id
    for seq in (30_000_000, 2**64 - 1):
        with pytest.raises(InvalidRequestError, match="far beyond"):
            client.send(call_to_proto(batch(1), Position(run_id=run_id, seq=seq)))
    client.send(resume_request(run_id, [2]))
    with pytest.raises(ServerError, match="not run again"):
        client.send(call_to_proto(batch(2), Position(run_id=run_id, seq=2)))
    assert client.send(runs_pb2.GetTrainingClientRequest(run_id=run_id)).next_seq == 3


def test_an_unload_that_cannot_be_written_leaves_a_working_run(
    client: RawClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = client.create(CONFIG).run_id
    with monkeypatch.context() as patch:
        patch.setattr(Database, "write", broken(ServerError("disk full")))
        with pytest.raises(ServerError):
            client.send(runs_pb2.UnloadModelRequest(run_id=run_id))
    assert client.call(run_id, 1, batch(1)).status == "completed"


def test_passes_answer_after_an_unload_with_what_came_of_them(
    client: RawClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = client.create(CONFIG).run_id
    work = BigramSession._compute

    def slow(self: BigramSession, request: Any) -> Any:
        time.sleep(0.5)
        return work(self, request)

    first = client.call(run_id, 1, batch(1)).result
    with monkeypatch.context() as patch:
        patch.setattr(BigramSession, "_compute", slow)
        for seq in (2, 3):
            client.send(call_to_proto(batch(1), Position(run_id=run_id, seq=seq)))
        client.send(runs_pb2.UnloadModelRequest(run_id=run_id))
    assert client.wait(run_id, 1).result == first
    assert client.wait(run_id, 2).result.loss == first.loss
    assert "was unloaded" in str(client.wait(run_id, 3).error)


def test_looking_at_an_ended_run_loads_nothing(server: EmbeddedServer, client: RawClient) -> None:
    run_id = client.create(CONFIG).run_id
    client.send(runs_pb2.UnloadModelRequest(run_id=run_id))
    assert client.send(runs_pb2.GetTrainingClientRequest(run_id=run_id)).status == "completed"
    assert server._server is not None
    assert not server._server._registry.in_memory("tenant-a", run_id)


def test_a_request_id_stands_for_one_configuration(client: RawClient) -> None:
    client.create(CONFIG, request_id="r")
    with pytest.raises(InvalidRequestError, match="another configuration"):
        client.create(CONFIG.model_copy(update={"seed": 2}), request_id="r")


def test_a_long_message_does_not_turn_into_another_error(client: RawClient) -> None:
    with pytest.raises(InvalidRequestError, match="model"):
        client.create(CONFIG.model_copy(update={"model_ref": "ü" * 500}))


def test_a_batch_of_too_many_tokens_is_refused_before_it_is_computed(tmp_path: Path) -> None:
    folder = ServerConfig(port=0, backend="bigram", data_dir=tmp_path / "data", max_batch_tokens=100)
    with EmbeddedServer(folder) as server:
        client = RawClient(server.address, server.mint_key("tenant-a"))
        run_id = client.create(CONFIG).run_id
        refused = client.call(run_id, 1, batch(1, records=10, tokens=12))
        assert "at most 100 tokens" in refused.error.constraint


def test_two_folders_do_not_share_a_database_or_artifacts(tmp_path: Path) -> None:
    first = ServerConfig(port=0, backend="bigram", data_dir=tmp_path / "a")
    other = tmp_path / "b"
    with EmbeddedServer(first):
        for shared in (
            {"artifacts_dir": first.resolved_artifacts_dir},
            {"database_url": first.resolved_database_url, "root_key": first.resolved_root_key},
        ):
            config = ServerConfig(port=0, backend="bigram", data_dir=other, **shared)  # type: ignore[arg-type]
            with pytest.raises(InvalidRequestError, match="another server uses"):
                EmbeddedServer(config).start()


def test_a_completed_run_that_made_room_answers_again_where_it_left_off(client: RawClient) -> None:
    """What ended without a row of its own, as refused and cancelled calls do, must not leave a gap in the numbers."""
    done = client.create(CONFIG.model_copy(update={"max_steps": 1})).run_id
    client.call(done, 1, batch(1))
    client.call(done, 2, Step())
    for seq in (3, 4):
        assert isinstance(client.call(done, seq, batch(seq)).error, InvalidRequestError)
    others = [client.create(CONFIG).run_id for _ in range(5)]  # the last of them needs the room
    client.send(runs_pb2.UnloadModelRequest(run_id=others[0]))
    assert loss(client, done, 5) > 0

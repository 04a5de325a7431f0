"""Addresses, names, purposes and lifetimes of checkpoints, and runs that go on from them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.server.rpc.raw_client import RawClient, batch
from tg_tinker.errors import InvalidRequestError, ResourceNotFoundError, ServerError, TGTinkerError
from tg_tinker.proto.v1 import artifacts_pb2, runs_pb2, sampling_pb2
from tg_tinker.types import DPConfig, OptimizerConfig, TrainingConfig
from tg_tinker.wire.call_messages import call_to_proto
from tg_tinker.wire.calls import Load, Position, Save, Step
from tg_tinker.wire.runs import config_from_json
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.service import checkpoints as module
from tg_tinker_server.store import artifact_rows

CONFIG = TrainingConfig(
    model_ref="bigram", batch_size=4, seed=1, optimizer=OptimizerConfig(learning_rate=0.05), metadata={"a": 1}
)
PAST = datetime(2020, 1, 1, tzinfo=UTC)


@pytest.fixture
def client(bigram_server: EmbeddedServer) -> RawClient:
    return RawClient(bigram_server.address, bigram_server.mint_key())


def save(client: RawClient, run_id: str, seq: int, **settings: Any) -> Any:
    state = client.call(run_id, seq, Save(**settings))
    assert state.error is None, state.error
    return state.result


def info(client: RawClient, path: str) -> artifacts_pb2.ArtifactInfo:
    return client.send(artifacts_pb2.GetArtifactRequest(artifact_id=path))


def blobs(server: EmbeddedServer) -> set[str]:
    return {p.name for p in server._config.resolved_artifacts_dir.rglob("*") if "ckpt_" in p.name}


def expire(server: EmbeddedServer, artifact_id: str) -> None:
    server._foundation.db.write(lambda tx: artifact_rows.set_expiry(tx, "default", artifact_id, PAST))


def test_a_checkpoint_has_one_address_for_each_purpose_and_an_id(client: RawClient) -> None:
    run = client.create(CONFIG, request_id="tinker/" + "a" * 32 + ":train:0")
    saved = {
        kind: save(client, run.run_id, seq, kind=kind, name="one", metadata={"epoch": seq})
        for seq, kind in enumerate(("state", "sampler", "external"), 1)
    }
    purposes = {"state": "weights", "sampler": "sampler_weights", "external": "external_weights"}
    for kind, result in saved.items():
        path = f"{run.run_id}/{purposes[kind]}/one"
        assert result.path == f"tg://{path}"
        by_model = f"tinker://{'a' * 32}:train:0/{purposes[kind]}/one"
        by_id = f"tg://{run.run_id}/{purposes[kind]}/{result.artifact_id}"
        for text in (result.path, result.artifact_id, by_model, by_id):
            found = info(client, text)
            assert found.artifact_id == result.artifact_id
            assert (found.kind, found.path, found.name) == (purposes[kind], result.path, "one")
            assert found.optimizer == (kind == "state")
    nameless = save(client, run.run_id, 4)
    assert nameless.path == f"tg://{run.run_id}/weights/{nameless.artifact_id}"
    assert info(client, nameless.path).artifact_id == nameless.artifact_id


@pytest.mark.parametrize(
    "path",
    [
        "tg://{run}/weights/two",
        "tg://{run}/sampler_weights/one",
        "tg://{run}/sampler_weights/{artifact}",
        "tg://{run}/other/one",
        "tg://{run}/weights/../weights/one",
        "tg://run_0/weights/one",
        "tinker://{run}/weights/one",
        "tg://{run}/one",
        "s3://{run}/weights/one",
        "",
        "../one",
    ],
)
def test_what_is_no_address_finds_nothing(client: RawClient, path: str) -> None:
    run = client.create(CONFIG)
    saved = save(client, run.run_id, 1, name="one")
    with pytest.raises(ResourceNotFoundError):
        info(client, path.format(run=run.run_id, artifact=saved.artifact_id))


@pytest.mark.parametrize("name", [".", "..", "../x", "a/b", "a b", "x" * 129, "\u00e9", "a\x00"])
def test_a_name_that_cannot_be_part_of_an_address_is_refused(
    client: RawClient, bigram_server: EmbeddedServer, name: str
) -> None:
    run = client.create(CONFIG)
    error = client.call(run.run_id, 1, Save(name=name)).error
    assert isinstance(error, InvalidRequestError)
    assert error.field == "name"
    assert not blobs(bigram_server)


def test_a_name_is_taken_until_it_is_overwritten_deleted_or_expired(
    client: RawClient, bigram_server: EmbeddedServer
) -> None:
    run = client.create(CONFIG)
    first = save(client, run.run_id, 1, name="one")
    error = client.call(run.run_id, 2, Save(name="one")).error
    assert isinstance(error, InvalidRequestError)
    assert "overwrite" in error.message
    assert len(blobs(bigram_server)) == 1  # what was refused left nothing
    save(client, run.run_id, 3, name="one", kind="sampler")  # another purpose, another name
    second = save(client, run.run_id, 4, name="one", overwrite=True)
    assert info(client, first.path).artifact_id == second.artifact_id
    with pytest.raises(ResourceNotFoundError):
        info(client, first.artifact_id)
    client.send(artifacts_pb2.DeleteArtifactRequest(artifact_id=first.path))
    third = save(client, run.run_id, 5, name="one")
    expire(bigram_server, third.artifact_id)
    fourth = save(client, run.run_id, 6, name="one")
    assert info(client, first.path).artifact_id == fourth.artifact_id
    other = client.create(CONFIG)
    assert save(client, other.run_id, 1, name="one").path != first.path


def test_of_two_saves_of_one_name_at_once_one_wins(client: RawClient, bigram_server: EmbeddedServer) -> None:
    run = client.create(CONFIG)
    with ThreadPoolExecutor(2) as pool:
        requests = [call_to_proto(Save(name="one"), Position(run_id=run.run_id, seq=n)) for n in (1, 2)]
        list(pool.map(client.send, requests))
    outcomes = sorted(client.wait(run.run_id, n).status for n in (1, 2))
    assert outcomes == ["completed", "failed"]
    assert len(blobs(bigram_server)) == 1


def test_what_has_expired_is_missing_at_once_wherever_it_is_asked_for(
    client: RawClient, bigram_server: EmbeddedServer
) -> None:
    run = client.create(CONFIG)
    kept = save(client, run.run_id, 1, name="kept")
    gone = save(client, run.run_id, 2, name="gone", ttl_seconds=3600)
    left = info(client, gone.path).expires.ToDatetime(UTC) - datetime.now(UTC)
    assert timedelta(minutes=59) < left <= timedelta(hours=1)
    assert not info(client, kept.path).HasField("expires")
    expire(bigram_server, gone.artifact_id)
    for name in (gone.artifact_id, gone.path):
        for request in (
            artifacts_pb2.GetArtifactRequest(artifact_id=name),
            artifacts_pb2.PullArtifactRequest(artifact_id=name),
            artifacts_pb2.DeleteArtifactRequest(artifact_id=name),
            artifacts_pb2.SetArtifactTTLRequest(artifact_id=name),
            runs_pb2.CreateTrainingClientRequest(like=name),
            runs_pb2.CreateTrainingClientRequest(config_json=run.config_json, checkpoint_id=name),
            sampling_pb2.CreateSamplerRequest(path=name),
        ):
            with pytest.raises(ResourceNotFoundError):
                client.send(request)
    assert isinstance(client.call(run.run_id, 3, Load(artifact_id=gone.artifact_id)).error, ResourceNotFoundError)
    listed = client.send(artifacts_pb2.ListArtifactsRequest())
    assert [a.artifact_id for a in listed.artifacts] == [kept.artifact_id]
    assert listed.total == 1
    # Missing already; the sweep takes its bytes, and those of nothing else.
    assert {b.split(".")[0] for b in blobs(bigram_server)} >= {gone.artifact_id, kept.artifact_id}
    server: Any = bigram_server._server
    assert server._sweeper.sweep() == 1
    assert {b.split(".")[0] for b in blobs(bigram_server)} == {kept.artifact_id}
    assert server._sweeper.sweep() == 0


def test_a_lifetime_can_be_set_later_and_taken_back(client: RawClient) -> None:
    run = client.create(CONFIG)
    saved = save(client, run.run_id, 1)
    changed = client.send(artifacts_pb2.SetArtifactTTLRequest(artifact_id=saved.path, ttl_seconds=60))
    assert changed.HasField("expires")
    assert not client.send(artifacts_pb2.SetArtifactTTLRequest(artifact_id=saved.path)).HasField("expires")
    for seconds in (0, -1, 2**62):
        with pytest.raises(InvalidRequestError, match="ttl"):
            client.send(artifacts_pb2.SetArtifactTTLRequest(artifact_id=saved.path, ttl_seconds=seconds))


def test_a_restart_sweeps_what_expired_and_what_a_crash_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ServerConfig(port=0, backend="bigram", data_dir=tmp_path / "data")
    with EmbeddedServer(config) as server:
        client = RawClient(server.address, server.mint_key())
        run = client.create(CONFIG)
        kept = save(client, run.run_id, 1, name="kept")
        gone = save(client, run.run_id, 2, name="gone", ttl_seconds=60)
        expire(server, gone.artifact_id)

        def crash(*_: Any, **__: Any) -> None:
            raise ServerError("as if the process died between ciphertext and row")

        monkeypatch.setattr(module.artifact_rows, "insert_artifact", crash)
        assert client.call(run.run_id, 3, Save(name="crashed")).status == "failed"
        assert len(blobs(server)) == 3
    monkeypatch.undo()
    with EmbeddedServer(config) as server:
        assert {b.split(".")[0] for b in blobs(server)} == {kept.artifact_id}


def test_pages_are_disjoint_and_whole(client: RawClient) -> None:
    runs = [client.create(CONFIG).run_id for _ in range(5)]
    for n in range(1, 8):
        save(client, runs[0], n, kind="sampler" if n % 2 else "state", metadata={"n": n})
    seen: list[str] = []
    while page := client.send(artifacts_pb2.ListArtifactsRequest(limit=3, offset=len(seen))).artifacts:
        seen += [a.metadata_json for a in page]
    assert seen == [f'{{"n":{n}}}' for n in range(7, 0, -1)]
    assert client.send(artifacts_pb2.ListArtifactsRequest(kind="weights", limit=1)).total == 3
    assert client.send(artifacts_pb2.ListArtifactsRequest(run_id=runs[1])).total == 0
    found: list[str] = []
    while page := client.send(runs_pb2.ListTrainingClientsRequest(limit=2, offset=len(found))).runs:
        found += [r.run_id for r in page]
    assert found == runs[::-1]
    assert client.send(runs_pb2.ListTrainingClientsRequest(limit=2)).total == 5
    for offset in (-1, 2**62):
        with pytest.raises(InvalidRequestError):
            client.send(runs_pb2.ListTrainingClientsRequest(offset=offset))
    with pytest.raises(InvalidRequestError):
        client.send(artifacts_pb2.ListArtifactsRequest(kind="weight"))


def test_large_metadata_comes_back_with_the_checkpoint_and_is_not_listed(client: RawClient) -> None:
    run = client.create(CONFIG)
    saved = save(client, run.run_id, 1, metadata={"x": "y" * 5000})
    assert info(client, saved.path).metadata_json == "{}"
    loaded: Any = client.call(run.run_id, 2, Load(artifact_id=saved.path)).result
    assert loaded.metadata == {"x": "y" * 5000}


def stepped(client: RawClient, run_id: str, seq: int, seed: int) -> str:
    """Take a step; the hash of the gradient of the next batch tells one state of weights from another."""
    assert client.call(run_id, seq, batch(seed)).status == "completed"
    assert client.call(run_id, seq + 1, Step()).status == "completed"
    after: Any = client.call(run_id, seq + 2, batch(99, train=False)).result
    return repr(after.loss)


def test_by_id_all_is_loaded_by_path_the_weights_and_a_word_wins(client: RawClient) -> None:
    run = client.create(CONFIG)
    stepped(client, run.run_id, 1, 0)
    saved = save(client, run.run_id, 4, name="one")
    truth = stepped(client, run.run_id, 5, 1)  # with the optimizer that went on
    fresh = None
    for n, (name, optimizer, whole) in enumerate(
        [
            (saved.artifact_id, None, True),
            (saved.path, None, False),
            (saved.path, True, True),
            (saved.artifact_id, False, False),
        ]
    ):
        seq = 8 + 4 * n
        assert client.call(run.run_id, seq, Load(artifact_id=name, optimizer=optimizer)).status == "completed"
        after = stepped(client, run.run_id, seq + 1, 1)
        assert (after == truth) is whole
        if not whole:
            assert fresh in (None, after)
            fresh = after


def test_an_optimizer_that_was_not_saved_cannot_be_asked_for(client: RawClient) -> None:
    run = client.create(CONFIG)
    saved = save(client, run.run_id, 1, kind="sampler", include_optimizer=True)
    assert isinstance(client.call(run.run_id, 2, Load(artifact_id=saved.path, optimizer=True)).error, TGTinkerError)
    assert client.call(run.run_id, 3, Load(artifact_id=saved.artifact_id)).status == "completed"
    with pytest.raises(InvalidRequestError, match="optimizer"):
        client.send(runs_pb2.CreateTrainingClientRequest(like=saved.path, optimizer=True))


def test_a_run_goes_on_where_a_checkpoint_was_saved(client: RawClient) -> None:
    run = client.create(CONFIG)
    stepped(client, run.run_id, 1, 0)
    saved = save(client, run.run_id, 4)
    truth = stepped(client, run.run_id, 5, 1)
    request = runs_pb2.CreateTrainingClientRequest(
        request_id="go-on", like=saved.path, optimizer=True, base_model="bigram", metadata_json='{"b":2}'
    )
    again = client.send(request)
    config = config_from_json(again.config_json)
    assert config == CONFIG.model_copy(update={"metadata": {"b": 2}})
    assert again.step == 1
    assert stepped(client, again.run_id, 1, 1) == truth
    client.send(artifacts_pb2.DeleteArtifactRequest(artifact_id=saved.path))
    assert client.send(request).run_id == again.run_id  # a repeated request, its checkpoint gone meanwhile
    with pytest.raises(ResourceNotFoundError):
        client.send(runs_pb2.CreateTrainingClientRequest(request_id="new", like=saved.path))


def test_another_base_model_is_refused(client: RawClient) -> None:
    run = client.create(CONFIG)
    saved = save(client, run.run_id, 1)
    with pytest.raises(InvalidRequestError, match="bigram"):
        client.send(runs_pb2.CreateTrainingClientRequest(like=saved.path, base_model="other"))


@pytest.mark.parametrize("dataset_id", ["people", None])
def test_what_goes_on_privately_spends_from_the_same_budget(client: RawClient, dataset_id: str | None) -> None:
    dp = DPConfig(dataset_id=dataset_id, target_epsilon=100.0, noise_multiplier=2.0)
    run = client.create(CONFIG.model_copy(update={"dp_config": dp}))
    stepped(client, run.run_id, 1, 0)
    saved = save(client, run.run_id, 4)
    again = client.send(runs_pb2.CreateTrainingClientRequest(request_id="go-on", like=saved.path))
    assert again.privacy.dataset_id == (dataset_id or run.run_id)
    before = again.privacy.epsilon_spent
    assert before > 0
    stepped(client, again.run_id, 1, 1)
    now = client.send(runs_pb2.GetTrainingClientRequest(run_id=run.run_id)).privacy.epsilon_spent
    assert now > before

"""Addresses, purposes and lifetimes of checkpoints."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.server.rpc.raw_client import RawClient
from tests.server.service.state_calls import CONFIG, blobs, expire, info, save
from tg_tinker.errors import InvalidRequestError, ResourceNotFoundError, ServerError
from tg_tinker.proto.v1 import artifacts_pb2, runs_pb2, sampling_pb2
from tg_tinker.wire.calls import Load, Save
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.service import checkpoints as module


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

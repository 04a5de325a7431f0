"""Saving a run under names, and loading what was saved."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.server.rpc.raw_client import RawClient
from tests.server.service.state_calls import CONFIG, blobs, expire, info, save, stepped
from tg_tinker.errors import InvalidRequestError, ResourceNotFoundError, TGTinkerError
from tg_tinker.proto.v1 import artifacts_pb2, runs_pb2
from tg_tinker.wire.call_messages import call_to_proto
from tg_tinker.wire.calls import Load, Position, Save
from tg_tinker_server.app import EmbeddedServer


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


def test_large_metadata_comes_back_with_the_checkpoint_and_is_not_listed(client: RawClient) -> None:
    run = client.create(CONFIG)
    saved = save(client, run.run_id, 1, metadata={"x": "y" * 5000})
    assert info(client, saved.path).metadata_json == "{}"
    loaded: Any = client.call(run.run_id, 2, Load(artifact_id=saved.path)).result
    assert loaded.metadata == {"x": "y" * 5000}


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

"""Runs that go on where a checkpoint was saved."""

from __future__ import annotations

import pytest

from tests.server.rpc.raw_client import RawClient
from tests.server.service.state_calls import CONFIG, save, stepped
from tg_tinker.errors import InvalidRequestError, ResourceNotFoundError
from tg_tinker.proto.v1 import artifacts_pb2, runs_pb2
from tg_tinker.types import DPConfig
from tg_tinker.wire.runs import config_from_json


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

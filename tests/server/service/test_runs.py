"""Creating runs: repeated requests, what a run says of itself, and what the server says of itself."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.server.rpc.raw_client import RawClient
from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker.proto.v1 import runs_pb2
from tg_tinker.types import DPConfig, LoRAConfig, TrainingConfig
from tg_tinker.types.losses import LOSSES
from tg_tinker.wire.methods import methods
from tg_tinker.wire.requests import create_run
from tg_tinker.wire.runs import capabilities_from_proto, config_from_json, config_to_json, run_info_from_proto
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.service import runs as module

CONFIG = TrainingConfig(model_ref="bigram", batch_size=4, seed=1)


@pytest.fixture
def sessions(bigram_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many sessions the backend opened, and how many of them were closed."""
    counts = {"opened": 0, "closed": 0}
    server: Any = bigram_server._server
    backend = server._registry.factory.backend
    opening = backend.open

    def counted(**arguments: Any) -> Any:
        session = opening(**arguments)
        counts["opened"] += 1
        closing = session.close

        def close() -> None:
            counts["closed"] += 1
            closing()

        session.close = close
        return session

    monkeypatch.setattr(type(backend), "open", lambda _, **arguments: counted(**arguments))
    return counts


def test_a_retried_create_is_one_run_and_one_session(client: RawClient, sessions: dict[str, int]) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: client.create(CONFIG, request_id="same").run_id, range(16)))
    assert len(set(made)) == 1
    assert sessions == {"opened": 1, "closed": 0}
    with pytest.raises(InvalidRequestError, match="another configuration"):
        client.create(CONFIG.model_copy(update={"batch_size": 5}), request_id="same")
    client.send(runs_pb2.UnloadModelRequest(run_id=made[0]))
    assert sessions == {"opened": 1, "closed": 1}


def test_a_create_that_fails_half_way_leaves_no_session(
    client: RawClient, sessions: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ServerError("as if the disk were full")

    monkeypatch.setattr(module.run_rows, "insert_run", fails)
    with pytest.raises(ServerError):
        client.create(CONFIG, request_id="same")
    assert sessions == {"opened": 1, "closed": 1}
    monkeypatch.undo()
    assert client.create(CONFIG, request_id="same").run_id


def test_a_run_says_what_it_is(client: RawClient) -> None:
    made = client.create(CONFIG.model_copy(update={"lora_config": LoRAConfig(rank=3)}), request_id="mine")
    for request in (
        runs_pb2.GetTrainingClientRequest(run_id=made.run_id),
        runs_pb2.GetTrainingClientRequest(run_id=made.run_id, summary=True),
    ):
        info = run_info_from_proto(client.send(request))
        assert (info.model_name, info.family, info.request_id) == ("bigram", "bigram", "mine")
        assert info.is_lora
        assert info.lora_rank == 3
        assert info.config.mixed_precision == "bf16"
        assert info.updated is not None
        assert info.updated >= info.created
    whole = run_info_from_proto(client.create(CONFIG))
    assert not whole.is_lora
    assert whole.lora_rank is None
    assert whole.base_dtype == "float32"
    assert whole.next_seq == 1


def test_a_summary_brings_nothing_back_into_memory(client: RawClient, sessions: dict[str, int]) -> None:
    made = client.create(CONFIG)
    client.send(runs_pb2.UnloadModelRequest(run_id=made.run_id))
    info = client.send(runs_pb2.GetTrainingClientRequest(run_id=made.run_id, summary=True))
    assert info.status == "completed"
    assert info.unit_key == b""
    assert sessions["opened"] == 1


def test_capabilities_name_every_loss_reducer_and_method(client: RawClient) -> None:
    found = capabilities_from_proto(client.send(runs_pb2.GetCapabilitiesRequest()))
    assert set(found.losses) == {*LOSSES, "custom"}
    assert {"sum", "mean", "min", "max", "slack", "unique", "hash_unordered", "hash2"} <= set(found.reducers)
    assert set(found.api) == {m.path.removeprefix("/") for m in methods()}


def test_what_was_not_asked_for_is_not_sent_and_means_the_same() -> None:
    asked = CONFIG.model_copy(update={"dp_config": DPConfig(target_epsilon=3.0)})
    sent = create_run("r", asked, None).config_json
    dp = config_from_json(sent).dp_config
    assert dp is not None
    assert dp.model_fields_set == {"target_epsilon"}
    assert config_from_json(sent).model_dump() == config_from_json(config_to_json(asked)).model_dump()

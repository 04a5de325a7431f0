"""Steps, saves and what is left of them, for tests through the real server and the NumPy model."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from tests.server.rpc.raw_client import RawClient, batch
from tg_tinker.proto.v1 import artifacts_pb2
from tg_tinker.types import OptimizerConfig, TrainingConfig
from tg_tinker.wire.calls import Save, Step
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.store import artifact_rows

CONFIG = TrainingConfig(
    model_ref="bigram", batch_size=4, seed=1, optimizer=OptimizerConfig(learning_rate=0.05), metadata={"a": 1}
)
PAST = datetime(2020, 1, 1, tzinfo=UTC)


def save(client: RawClient, run_id: str, seq: int, **settings: Any) -> Any:
    state = client.call(run_id, seq, Save(**settings))
    assert state.error is None, state.error
    return state.result


def stepped(client: RawClient, run_id: str, seq: int, seed: int) -> str:
    """Take a step; the hash of the gradient of the next batch tells one state of weights from another."""
    assert client.call(run_id, seq, batch(seed)).status == "completed"
    assert client.call(run_id, seq + 1, Step()).status == "completed"
    after: Any = client.call(run_id, seq + 2, batch(99, train=False)).result
    return repr(after.loss)


def info(client: RawClient, path: str) -> artifacts_pb2.ArtifactInfo:
    return client.send(artifacts_pb2.GetArtifactRequest(artifact_id=path))


def blobs(server: EmbeddedServer) -> set[str]:
    return {p.name for p in server._config.resolved_artifacts_dir.rglob("*") if "ckpt_" in p.name}


def expire(server: EmbeddedServer, artifact_id: str) -> None:
    server._foundation.db.write(lambda tx: artifact_rows.set_expiry(tx, "default", artifact_id, PAST))

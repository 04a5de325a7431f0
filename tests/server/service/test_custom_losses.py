"""Losses of callers: kept sealed by tenant, computed on the server, and never code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.server.rpc.raw_client import RawClient
from tg_tinker.errors import InvalidRequestError, RateLimitedError, ResourceNotFoundError
from tg_tinker.proto.v1 import training_pb2
from tg_tinker.types import DPConfig, LoRAConfig, TrainingConfig
from tg_tinker.types.datum import Datum, ModelInput, TensorData
from tg_tinker.types.losses import Loss
from tg_tinker.wire.calls import LossPass, Step
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.service import custom_losses as module

# loss = -(logprobs * weights).sum(), as torch.fx records it.
GRAPH = json.dumps(
    {
        "format": 1,
        "nodes": [
            {"op": "placeholder", "name": "logprobs", "target": "logprobs", "args": []},
            {"op": "placeholder", "name": "weights", "target": "weights", "args": []},
            {
                "op": "call_function",
                "name": "mul",
                "target": "operator.mul",
                "args": [{"ref": "logprobs"}, {"ref": "weights"}],
                "kwargs": {},
            },
            {"op": "call_method", "name": "total", "target": "sum", "args": [{"ref": "mul"}]},
            {
                "op": "call_function",
                "name": "neg",
                "target": "operator.neg",
                "args": [{"ref": "total"}],
                "kwargs": {},
            },
            {
                "op": "output",
                "name": "output",
                "target": "output",
                "args": [{"tuple": [{"ref": "neg"}, {"dict": {}}]}],
                "kwargs": {},
            },
        ],
    }
)
CONFIG = TrainingConfig(
    model_ref="tiny-llama-2m", lora_config=LoRAConfig(rank=2), batch_size=2, seed=1, max_sequence_length=32
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("torch")
    with EmbeddedServer(ServerConfig(port=0, data_dir=folder / "data", device="cpu", base_dtype="float32")) as server:
        yield server


def data() -> tuple[Datum, ...]:
    rng = np.random.default_rng(0)
    return tuple(
        Datum(
            ModelInput.from_ints(rng.integers(5, 200, n).tolist()),
            {
                "target_tokens": TensorData(rng.integers(5, 200, n), "int64"),
                "weights": TensorData(rng.uniform(size=n), "float32"),
            },
        )
        for n in (5, 3)
    )


def created(client: RawClient, graph: str = GRAPH) -> str:
    return str(client.send(training_pb2.CreateCustomLossRequest(graph_json=graph)).loss_id)


def test_a_graph_computes_what_the_loss_of_its_formula_does(server: EmbeddedServer) -> None:
    """Cross-entropy written as a graph has its loss, its log-probabilities and its gradient."""
    client = RawClient(server.address, server.mint_key("graphs"))
    custom = Loss.of("custom", {"loss_id": created(client)})
    found: list[Any] = []
    for loss in (Loss.of("cross_entropy"), custom):
        run = client.create(CONFIG)
        passed: Any = client.call(run.run_id, 1, LossPass(data=data(), loss=loss))
        assert passed.error is None, passed.error
        stepped: Any = client.call(run.run_id, 2, Step()).result
        found.append((passed.result, stepped.metrics["unclipped_grad_norm"]))
    (one, norm), (other, other_norm) = found
    assert other.metrics["loss:sum"] == pytest.approx(one.metrics["loss:sum"], rel=1e-5)
    assert other_norm == pytest.approx(norm, rel=1e-4)
    for a, b in zip(one.loss_fn_outputs, other.loss_fn_outputs, strict=True):
        assert np.allclose(a["logprobs"].to_numpy(), b["logprobs"].to_numpy(), atol=1e-6)


def test_a_graph_is_of_each_datum_alone_and_may_be_private(server: EmbeddedServer) -> None:
    client = RawClient(server.address, server.mint_key("private"))
    config = CONFIG.model_copy(update={"dp_config": DPConfig(dataset_id="people", target_epsilon=100.0)})
    run = client.create(config)
    loss = Loss.of("custom", {"loss_id": created(client)})
    assert client.call(run.run_id, 1, LossPass(data=data(), loss=loss)).status == "completed"
    stepped: Any = client.call(run.run_id, 2, Step()).result
    assert stepped.dp_metrics.noise_applied


def test_one_graph_is_one_loss_of_its_tenant_alone(server: EmbeddedServer) -> None:
    mine, theirs = (RawClient(server.address, server.mint_key(t)) for t in ("mine", "theirs"))
    loss_id = created(mine)
    assert created(mine) == loss_id
    assert created(theirs) != loss_id
    run = theirs.create(CONFIG)
    call = LossPass(data=data(), loss=Loss.of("custom", {"loss_id": loss_id}))
    assert isinstance(theirs.call(run.run_id, 1, call).error, ResourceNotFoundError)


def test_what_is_no_allowed_graph_is_refused_and_not_kept(server: EmbeddedServer) -> None:
    client = RawClient(server.address, server.mint_key("refused"))
    losses: Any = server._server._operations  # type: ignore[union-attr]
    before = losses.db.read(lambda tx: module.loss_rows.count_losses(tx, "refused"))
    for graph in ("", "{", "{}", GRAPH.replace("operator.mul", "os.system"), " " * (module.MAX_GRAPH_BYTES + 1)):
        with pytest.raises(InvalidRequestError):
            created(client, graph)
    assert losses.db.read(lambda tx: module.loss_rows.count_losses(tx, "refused")) == before == 0


def test_a_tenant_has_only_so_many(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LOSSES", 1)
    client = RawClient(server.address, server.mint_key("many"))
    first = created(client)
    with pytest.raises(RateLimitedError):
        created(client, GRAPH + " ")
    assert created(client) == first


def test_at_rest_a_graph_is_sealed_and_survives_a_restart(tmp_path: Path) -> None:
    config = ServerConfig(port=0, data_dir=tmp_path / "data", device="cpu", base_dtype="float32")
    with EmbeddedServer(config) as server:
        key = server.mint_key()
        loss_id = created(RawClient(server.address, key))
    assert b"operator.mul" not in b"".join(p.read_bytes() for p in (tmp_path / "data").glob("*.db*"))
    with EmbeddedServer(config) as server:
        client = RawClient(server.address, key)
        run = client.create(CONFIG)
        call = LossPass(data=data(), loss=Loss.of("custom", {"loss_id": loss_id}), train=False)
        assert client.call(run.run_id, 1, call).status == "completed"

"""Plain weights out of a run and into a checkpoint: whole, settled, finite, and never without their promise."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from tests.server.service.test_imports import ciphertexts
from tg_tinker import ServiceClient
from tg_tinker.errors import (
    AuthorizationError,
    DPUnsupportedError,
    InvalidRequestError,
    ResourceNotFoundError,
    ServerError,
    TGTinkerError,
)
from tg_tinker.proto.v1 import federation_pb2
from tg_tinker.types import BatchData, DPConfig, LoRAConfig, OptimizerConfig, TrainingConfig, WeightsSource
from tg_tinker.wire import federation
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.engine.bigram import BigramSession
from tg_tinker_server.service import uploads
from tg_tinker_server.store import audit_rows

JOB = "ab" * 32
ROLES = ("trainer", "exporter", "auditor")
BATCH = BatchData(input_ids=[[1, 2, 3, 4], [5, 6, 7, 8]])
CONFIG = TrainingConfig(
    model_ref="bigram", lora_config=LoRAConfig(), optimizer=OptimizerConfig(name="sgd", learning_rate=0.5)
)
PRIVATE = CONFIG.model_copy(update={"dp_config": DPConfig(dataset_id="people", target_epsilon=100.0)})


def table(fill: float = 0.0, seed: int = 5) -> dict[str, Any]:
    return {"table": np.random.default_rng(seed).normal(fill, 1.0, (260, 260)).astype(np.float32)}


def stated(round_: int = 3, epsilon: float = 2.5, **other: Any) -> WeightsSource:
    return WeightsSource(**{"job": JOB, "round": round_, "epsilon": epsilon, "delta": 1e-5, **other})


@pytest.fixture
def config(tmp_path: Path) -> ServerConfig:
    return ServerConfig(port=0, backend="bigram", data_dir=tmp_path / "data")


@pytest.fixture
def server(config: ServerConfig) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(config) as running:
        yield running


@pytest.fixture
def service(server: EmbeddedServer) -> Iterator[ServiceClient]:
    with ServiceClient(server.mint_key("default", ROLES), server.address) as client:
        yield client


def bring(service: ServiceClient, tensors: Any = None, source: WeightsSource | None = None, step: int = 7) -> str:
    return service.import_weights(
        table() if tensors is None else tensors,
        base_model="bigram",
        lora_config=LoRAConfig(),
        step=step,
        source=source or stated(),
    ).artifact_id


def test_pulled_weights_are_those_after_every_call_made_before(service: ServiceClient) -> None:
    tc = service.create_training_client(CONFIG)
    before = tc.pull_weights()
    assert before.step == 0
    assert not before.tensors["table"].any()
    tc.forward_backward(BATCH)
    tc.optim_step()
    after = tc.pull_weights()  # waits, like sample
    assert after.step == 1
    # A second answer: where the step went, by the rule of SGD on the gradient of the saved checkpoint's file.
    saved = tc.save_state(include_optimizer=False)
    moved = after.tensors["table"] - before.tensors["table"]
    assert np.flatnonzero(np.abs(moved).sum(axis=1)).tolist() == [1, 2, 3, 5, 6, 7]
    fresh = service.create_training_client(CONFIG, checkpoint_id=saved.artifact_id)
    np.testing.assert_array_equal(fresh.pull_weights().tensors["table"], after.tensors["table"])


def test_gradients_that_wait_for_their_step_never_show(service: ServiceClient) -> None:
    tc = service.create_training_client(PRIVATE)
    tc.forward_backward(BATCH).result()
    assert not tc.pull_weights().tensors["table"].any()


def test_a_step_that_failed_shows_nothing(service: ServiceClient, monkeypatch: pytest.MonkeyPatch) -> None:
    tc = service.create_training_client(PRIVATE)
    tc.forward_backward(BATCH).result()
    real = BigramSession.export_state

    def broken(self: Any, *, optimizer: bool) -> Any:
        if optimizer:  # the step has moved the weights, and cannot be written down
            raise OSError("the disk is gone")
        return real(self, optimizer=optimizer)

    monkeypatch.setattr(BigramSession, "export_state", broken)
    step = tc.optim_step()
    pulled = tc.pull_weights()
    assert step.exception() is not None
    assert pulled.step == 0
    assert not pulled.tensors["table"].any()


def test_a_pull_waits_for_a_step_of_another_client_that_is_being_settled(
    server: EmbeddedServer, service: ServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    tc = service.create_training_client(CONFIG)
    tc.forward_backward(BATCH).result()
    stepped, go_on = threading.Event(), threading.Event()
    real = BigramSession.export_state

    def slow(self: Any, *, optimizer: bool) -> Any:
        made = real(self, optimizer=optimizer)
        if optimizer:
            stepped.set()
            threading.Timer(0.3, go_on.set).start()
            assert go_on.wait(10)
        return made

    monkeypatch.setattr(BigramSession, "export_state", slow)
    step = tc.optim_step()
    with ServiceClient(server.mint_key("default", ROLES), server.address) as other:
        watcher = other.get_training_client(tc.id)
        assert stepped.wait(10)
        pulled = watcher.pull_weights()
    assert go_on.is_set()
    assert pulled.step == 1
    assert step.result().step == 1


def test_a_pull_needs_the_role_of_an_exporter_and_is_noted(server: EmbeddedServer, service: ServiceClient) -> None:
    tc = service.create_training_client(CONFIG)
    with (
        ServiceClient(server.mint_key("default", ("trainer",)), server.address) as trainer,
        pytest.raises(AuthorizationError, match="export"),
    ):
        trainer.get_training_client(tc.id).pull_weights()
    tc.pull_weights()
    (record,) = service.get_audit_logs(operation="pull_weights")
    assert (record.training_client_id, record.success, record.facts["step"]) == (tc.id, True, "0")
    assert record.facts["digest"].startswith("hmac-sha256:")  # keyed: nobody can confirm a guess
    with pytest.raises(ResourceNotFoundError):
        list(service._transport.stream(federation.pull_weights("run_" + "0" * 24)))


def test_what_was_pulled_can_be_brought_again_and_loaded(service: ServiceClient) -> None:
    tc = service.create_training_client(PRIVATE)
    info = service.import_weights(table(), base_model="bigram", lora_config=LoRAConfig(), step=7, source=stated())
    assert (info.step, info.training_client_id) == (7, "imported")
    assert tc.load_state(info.artifact_id, optimizer=False).step == 7
    pulled = tc.pull_weights()
    assert pulled.step == 7
    np.testing.assert_array_equal(pulled.tensors["table"], table()["table"])
    assert pulled.tensors["table"].flags.writeable
    assert service.list_artifacts()[0] == info
    (record,) = service.get_audit_logs(operation="import_weights")
    assert record.artifact_ids == [info.artifact_id]
    assert record.facts == {"job": JOB, "round": "3", "epsilon": "2.5", "delta": "1e-05"}


def test_what_is_brought_lies_encrypted(service: ServiceClient, config: ServerConfig) -> None:
    artifact_id = bring(service, {"table": np.full((260, 260), 1.5, np.float32)})
    data = (config.resolved_artifacts_dir / artifact_id).read_bytes()
    assert np.float32(1.5).tobytes() * 4 not in data
    assert b"table" not in data
    assert JOB.encode() not in data


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ({"table": np.zeros((260, 260))}, "float64"),
        ({"table": [[0.0]]}, "list"),
        ({"table": np.full((260, 260), math.nan, np.float32)}, "not finite"),
        ({"a name": np.zeros(2, np.float32)}, "no name of a parameter"),
        ({"__metadata__/x": np.zeros(2, np.float32)}, "no name of a parameter"),
    ],
    ids=["float64", "list", "nan", "a space", "a slash"],
)
def test_what_is_no_weight_is_refused_before_it_is_sent(service: ServiceClient, tensors: Any, why: str) -> None:
    with pytest.raises(InvalidRequestError, match=why):
        bring(service, tensors)
    assert service.get_audit_logs(operation="import_weights") == []


def send(service: ServiceClient, file: bytes, *, cut: int = 1000, size: int | None = None, **head: Any) -> Any:
    """An import with the bare protocol: nothing is checked on this side."""
    new = federation_pb2.ImportWeightsHead(
        base_model=head.pop("base_model", "bigram"),
        lora_config_json=head.pop("lora", LoRAConfig().model_dump_json()),
        step=head.pop("step", 7),
        size_bytes=len(file) if size is None else size,
        source=head.pop("source", federation.source_to_proto(stated())),
    )
    pieces = [federation_pb2.ImportWeightsRequest(data=file[i : i + cut]) for i in range(0, len(file), cut)]
    return service._transport.upload(iter([federation_pb2.ImportWeightsRequest(head=new), *pieces]))


def file_of(tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> bytes:
    return safetensors.numpy.save(tensors, metadata=metadata or {"format": "pt"})


SMALL = {"a.lora_A.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b.lora_B.weight": np.ones(3, np.float32)}


def spoiled(value: float) -> bytes:
    return file_of({**SMALL, "c": np.array([0, 0, value], np.float32)})


@pytest.mark.parametrize(
    ("file", "size"),
    [
        (file_of(SMALL), len(file_of(SMALL)) - 1),
        (file_of(SMALL), len(file_of(SMALL)) + 1),
        (file_of(SMALL) + bytes(4), None),
        (file_of(SMALL) + bytes(4), len(file_of(SMALL))),
        (file_of(SMALL)[:-4], len(file_of(SMALL))),
        (file_of(SMALL)[:-4], None),
        (b"", 10),
        (b"PK\x03\x04" + bytes(100), None),
        ((2**40).to_bytes(8, "little") + bytes(100), None),
        (file_of({"a": np.zeros(4, np.float64)}), None),
        (file_of({"a": np.zeros(4, np.uint32)}), None),
        (file_of({"a b": np.zeros(4, np.float32)}), None),
        (file_of({"": np.zeros(4, np.float32)}), None),
        (spoiled(math.nan), None),
        (spoiled(math.inf), None),
        (spoiled(-math.inf), None),
    ],
    ids=lambda v: f"{len(v)} bytes" if isinstance(v, bytes) else str(v),
)
def test_a_file_that_is_no_weights_leaves_nothing_behind(
    service: ServiceClient, config: ServerConfig, file: bytes, size: int | None
) -> None:
    for cut in (1, 7, 2**20):
        with pytest.raises(InvalidRequestError) as caught:
            send(service, file, cut=cut, size=size)
        assert caught.value.field == "tensors"
    assert service.list_artifacts() == []
    assert ciphertexts(config) == []
    records = service.get_audit_logs(operation="import_weights")
    assert [(r.success, r.error_code, r.artifact_ids) for r in records] == [(False, "INVALID_REQUEST", [])] * 3


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"base_model": "a model <script>"}, "base_model"),
        ({"lora": "{}}"}, "lora_config"),
        ({"lora": '{"rank":0}'}, "lora_config.rank"),
        ({"step": -1}, "step"),
        ({"size": 0}, "tensors"),
        ({"size": 2**31 + 1}, "tensors"),
        *(
            ({"source": federation_pb2.WeightsSource(**{**vars_of(), field: value})}, f"source.{field}")
            for vars_of in [
                lambda: {"kind": "federation", "job": JOB, "round": 1, "epsilon": 1.0, "delta": 0.1, "unit": "datum"}
            ]
            for field, value in [
                ("kind", "gift"),
                ("job", JOB.upper()),
                ("round", -1),
                ("epsilon", -1.0),
                ("epsilon", math.nan),
                ("delta", 0.0),
                ("delta", 1.0),
                ("unit", "nobody"),
            ]
        ),
    ],
    ids=str,
)
def test_a_head_that_cannot_be_is_refused_by_name(
    service: ServiceClient, changed: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        send(service, file_of(SMALL), **changed)
    assert caught.value.field == field
    assert service.list_artifacts() == []


def test_data_without_a_head_and_a_second_head_are_refused(service: ServiceClient) -> None:
    data, head = federation_pb2.ImportWeightsRequest(data=b"x"), federation_pb2.ImportWeightsRequest()
    for messages in ([data], [head, data]):
        with pytest.raises(InvalidRequestError, match="begins with"):
            service._transport.upload(iter(messages))
    new = federation.new_weights_to_proto(
        federation.NewWeights(base_model="bigram", lora_config=None, step=0, size_bytes=99, source=stated())
    )
    twice = [federation_pb2.ImportWeightsRequest(head=new)] * 2
    with pytest.raises(InvalidRequestError, match="only data"):
        service._transport.upload(iter(twice))


def test_weights_and_their_record_are_kept_together_or_not_at_all(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = audit_rows.insert_record

    def broken(tx: Any, row: Any) -> None:
        real(tx, row)
        raise OSError("the power is gone")

    with (
        EmbeddedServer(config) as server,
        ServiceClient(server.mint_key("default", ROLES), server.address) as service,
    ):
        monkeypatch.setattr(audit_rows, "insert_record", broken)
        with pytest.raises(TGTinkerError):
            bring(service)
        monkeypatch.setattr(audit_rows, "insert_record", real)
        assert service.list_artifacts() == []
        kept = bring(service)
    with EmbeddedServer(config):
        assert ciphertexts(config) == [kept]


@pytest.mark.parametrize(
    "tensors",
    [
        {"table": np.zeros((260, 259), np.float32)},
        {"tables": np.zeros((260, 260), np.float32)},
        {**table(), "more": np.zeros(1, np.float32)},
    ],
    ids=["shape", "name", "one too many"],
)
def test_weights_that_do_not_fit_the_run_are_refused_when_loaded(service: ServiceClient, tensors: Any) -> None:
    tc = service.create_training_client(CONFIG)
    with pytest.raises(InvalidRequestError, match="does not fit the run"):
        tc.load_state(bring(service, tensors))
    assert not tc.pull_weights().tensors["table"].any()


def test_weights_of_another_model_or_adapter_are_refused_when_loaded(service: ServiceClient) -> None:
    tc = service.create_training_client(CONFIG)
    for changed in ({"base_model": "tiny"}, {"lora_config": LoRAConfig(rank=4)}):
        given = {"base_model": "bigram", "lora_config": LoRAConfig(), **changed}
        info = service.import_weights(table(), source=stated(), **given)
        with pytest.raises(InvalidRequestError, match="another"):
            tc.load_state(info.artifact_id)


def test_weights_that_promise_nothing_are_refused_by_a_private_run(service: ServiceClient) -> None:
    artifact_id = bring(service, source=stated(epsilon=math.inf))
    with pytest.raises(DPUnsupportedError, match="a federation that promises nothing"):
        service.create_training_client(PRIVATE).load_state(artifact_id)
    with pytest.raises(DPUnsupportedError, match="a federation that promises nothing"):
        service.create_training_client(PRIVATE, checkpoint_id=artifact_id)
    public = DPConfig(dataset_id="others", target_epsilon=100.0, initial_weights="public")
    for config in (CONFIG, CONFIG.model_copy(update={"dp_config": public})):
        service.create_training_client(config).load_state(artifact_id)


def test_a_run_keeps_refusing_what_was_trained_from_weights_that_promise_nothing(service: ServiceClient) -> None:
    tc = service.create_training_client(CONFIG)
    tc.load_state(bring(service, source=stated(1, math.inf)), optimizer=False)
    tc.load_state(bring(service, source=stated(2, 1.0)), optimizer=False)  # nothing gets better by a later word
    saved = tc.save_state()
    with pytest.raises(DPUnsupportedError):
        service.create_training_client(PRIVATE).load_state(saved.artifact_id)


def lineage_of(server: EmbeddedServer, tc: Any) -> list[dict[str, Any]]:
    runs = server._server._registry.resident._runs  # type: ignore[union-attr]
    return list(json.loads(json.dumps(runs[("default", tc.id)].lineage)))


def test_dozens_of_rounds_of_one_job_leave_one_entry_also_after_a_restart(config: ServerConfig) -> None:
    with EmbeddedServer(config) as server:
        key = server.mint_key("default", ROLES)
        with ServiceClient(key, server.address) as service:
            tc = service.create_training_client(PRIVATE)
            for round_ in range(30):
                tc.load_state(bring(service, source=stated(round_, 0.1 * round_), step=round_), optimizer=False)
                tc.forward_backward(BATCH)
                tc.optim_step().result()
            (entry,) = lineage_of(server, tc)
            assert (entry["privacy"]["round"], entry["privacy"]["epsilon"]) == (29, repr(0.1 * 29))
            assert entry["privacy"]["attested_by"] == "caller"
            run_id = tc.id
    with EmbeddedServer(config) as server, ServiceClient(key, server.address) as service:
        tc = service.get_training_client(run_id)
        assert tc.pull_weights().step == 30
        assert lineage_of(server, tc) == [entry]


def test_weights_that_could_not_be_taken_back_are_shown_to_nobody(
    service: ServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    tc = service.create_training_client(PRIVATE)
    tc.forward_backward(BATCH).result()
    real = BigramSession.export_state

    def broken(self: Any, *, optimizer: bool) -> Any:
        if optimizer:
            raise OSError("the disk is gone")
        return real(self, optimizer=optimizer)

    def gone(self: Any, state: Any, *, optimizer: bool) -> None:
        raise OSError("for good")

    monkeypatch.setattr(BigramSession, "export_state", broken)
    monkeypatch.setattr(BigramSession, "import_state", gone)
    tc.optim_step()
    with pytest.raises(ServerError, match="failed half-way"):
        tc.pull_weights()


def test_whoever_reads_slowly_keeps_only_pulls_of_the_own_tenant_waiting(server: EmbeddedServer) -> None:
    size = 8 * 2**20  # 32 MiB: more than a connection takes ahead of its reader
    big = TrainingConfig(model_ref=f"vector:{size}")
    key = server.mint_key("slow", ROLES)
    with ServiceClient(key, server.address) as slow, ServiceClient(server.mint_key(), server.address) as other:
        tc, theirs = slow.create_training_client(big), other.create_training_client(CONFIG)
        held = [slow._transport.stream(federation.pull_weights(tc.id)) for _ in range(uploads.MOST_PER_TENANT)]
        assert [next(chunks).head.size_bytes > 4 * size for chunks in held] == [True, True]
        waiting = threading.Thread(target=tc.pull_weights)
        waiting.start()
        assert theirs.pull_weights().step == 0
        waiting.join(0.3)
        assert waiting.is_alive()
        held[0].close()  # its place is free again
        waiting.join(20)
        assert not waiting.is_alive()
        held[1].close()

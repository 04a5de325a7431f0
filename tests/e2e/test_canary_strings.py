"""A thousand marker strings go in by every door; none comes to rest where somebody else could read it.

They travel as token ids, labels, texts, prompts, stop strings, metadata, names, unit ids, registered records, wrong
ids and inside our own crashes. Searched are the data folder (database, its log, ciphertexts, keys), every line of
output at every level, what is said to the tenant's auditors and partners, and what the client remembers on disk.

Ids that a person chooses in order to be told apart, such as dataset ids and request ids, are not content: they are
public, and the ledger shows them. So is the reason given for a raise.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyrage
import pytest
import structlog

from tests.server.rpc.raw_client import RawClient
from tests.support.canaries import LENGTH, Searcher, markers
from tg_tinker import DPConfig, ServiceClient, TrainingClient, TrainingConfig
from tg_tinker.errors import TGTinkerError
from tg_tinker.proto.v1 import runs_pb2
from tg_tinker.reports.page import render
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.engine.bigram import BigramSession
from tg_tinker_server.logs import configure_logging
from tg_tinker_server.service import crashes
from tg_tinker_server.service.sealed_text import SealedText

ALL = markers(1000, seed=20260102)


def ids(texts: list[str]) -> np.ndarray:
    """Token ids of the bigram model are the bytes of a text."""
    return np.frombuffer("".join(texts).encode(), np.uint8).reshape(len(texts), LENGTH).astype(np.int64)


@dataclass
class Doors:
    """Hands out markers, each once, and notes which of them ended in an error on the way."""

    service: ServiceClient
    server: EmbeddedServer
    folder: Path
    closing: contextlib.ExitStack
    left: list[str] = field(default_factory=lambda: list(ALL))
    refused: int = 0

    def take(self, count: int) -> list[str]:
        taken, self.left = self.left[:count], self.left[count:]
        assert len(taken) == count
        return taken

    def run(self, **dp: Any) -> TrainingClient:
        private = DPConfig(**{"target_epsilon": None, **dp}) if dp else None
        return self.service.create_training_client(
            TrainingConfig(model_ref="bigram", batch_size=8, dp_config=private, max_sequence_length=64)
        )

    def expect_refusal(self, call: Callable[[], Any]) -> None:
        """Errors go to their caller and may quote it; they must come to rest nowhere."""
        with pytest.raises((TGTinkerError, ValueError)):
            call()
        self.refused += 1


def train(doors: Doors, run: TrainingClient, count: int) -> None:
    """As ids, as labels, as text that the server encodes."""
    for _ in range(count // 40):
        run.forward_backward({"input_ids": ids(doors.take(16))}).result()
        run.forward_backward({"input_ids": ids(doors.take(16)), "labels": ids(doors.take(8) * 2)}).result()
        run.optim_step().result()


def send_texts(doors: Doors, run: TrainingClient) -> None:
    """Encoding, prompts, stop strings, streams."""
    encoded = run.encode_batch(doors.take(50))
    assert run.decode_batch(encoded) == [bytes(e).decode() for e in encoded]
    run.sample(doors.take(40), max_tokens=3, stop_sequences=doors.take(4))
    for prompt in doors.take(5):
        list(run.sample_stream(prompt, max_tokens=3))


def save(doors: Doors, run: TrainingClient) -> str:
    """Metadata, its keys, and names; then back again."""
    artifact = ""
    for name in doors.take(10):
        key, value, nested = doors.take(3)
        saved = run.save_state(metadata={key: value, "list": [nested]}, name=name)
        artifact = saved.artifact_id
    loaded = run.load_state(artifact)
    assert loaded.metadata["list"]
    return artifact


def count_units(doors: Doors) -> None:
    """Names of privacy units, counted or not, and a unit that comes too often."""
    for sampling in ({"sampling": "none"}, {"sampling": "max_participation", "max_participation": 1}):
        run = doors.run(dataset_id=f"units-{sampling['sampling']}", privacy_unit="user", **sampling)
        units = doors.take(16)
        for _ in range(2 if sampling["sampling"] == "none" else 1):
            run.forward_backward({"input_ids": ids(doors.take(16))}, privacy_unit_ids=units).result()
            run.optim_step().result()
    run.forward_backward({"input_ids": ids(doors.take(16))}, privacy_unit_ids=units).result()
    doors.expect_refusal(lambda: run.optim_step().result())


def register(doors: Doors) -> str:
    """Records that the server keeps, drawn from and erased."""
    service = doors.service
    service.create_dataset("registered", doors.take(40), target_epsilon=None)
    service.create_dataset(
        "registered-units", doors.take(40), unit_ids=doors.take(20) * 2, privacy_unit="user", target_epsilon=None
    )
    run = doors.run(dataset_id="registered", sampling="poisson", target_delta=1e-2)
    for _ in range(5):
        run.forward_backward(dataset="registered").result()
        run.optim_step().result()
    service.create_dataset("forgotten", doors.take(20), target_epsilon=None)
    service.delete_dataset("forgotten")
    return "registered"


def be_wrong(doors: Doors, run: TrainingClient) -> None:
    """Markers where ids, names and numbers belong."""
    service = doors.service
    for wrong in doors.take(5):
        doors.expect_refusal(lambda wrong=wrong: service.create_training_client(TrainingConfig(model_ref=wrong)))
        doors.expect_refusal(lambda wrong=wrong: service.get_training_client(wrong))
        doors.expect_refusal(lambda wrong=wrong: service.get_future(wrong).result())
        doors.expect_refusal(lambda wrong=wrong: service.pull_artifact(wrong))
        doors.expect_refusal(lambda wrong=wrong: service.get_privacy_ledger(wrong))
        doors.expect_refusal(lambda wrong=wrong: service.get_privacy_report(wrong))
        doors.expect_refusal(lambda wrong=wrong: service.delete_dataset(wrong))
        doors.expect_refusal(lambda wrong=wrong: service.export_artifact(wrong, wrong, doors.folder / "none.age"))
        doors.expect_refusal(lambda wrong=wrong: run.load_state(wrong))
        doors.expect_refusal(lambda wrong=wrong: service.create_dataset(" " + wrong, [wrong]))
        doors.expect_refusal(
            lambda wrong=wrong: ServiceClient(base_url=doors.server.address, api_key=wrong).get_server_capabilities()
        )
    outside = ids(doors.take(4))
    outside[2, 20] = 70_000
    doors.expect_refusal(lambda: run.forward_backward({"input_ids": outside}).result())
    doors.expect_refusal(lambda: run.optim_step().result())
    raw = RawClient(doors.server.address, doors.server.mint_key("clinic"))
    for wrong in doors.take(5):
        request = runs_pb2.CreateTrainingClientRequest(request_id="r", config_json='{"model_ref": "' + wrong + '", }')
        doors.expect_refusal(lambda request=request: raw.send(request))
        doors.expect_refusal(lambda request=request, wrong=wrong: raw.send(request, payload=wrong.encode()))


def crash(doors: Doors, run: TrainingClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Defects of ours whose exceptions quote what they were given."""
    for method in ("_compute", "_apply", "export_state", "live_weights", "encode"):
        reached = []

        def quote(_: object, *args: object, **named: object) -> None:
            reached.append(args)  # noqa: B023 - called before the next round
            shown = [bytes(a.input_ids_BT.astype(np.uint8).ravel()) for a in args if hasattr(a, "input_ids_BT")]
            raise ValueError(f"cannot compute {doors.take(1)[0]} {args!r} {shown!r}") from KeyError(doors.take(1)[0])

        def use() -> None:
            run.forward_backward({"input_ids": ids(doors.take(8))}).result()
            run.optim_step().result()
            run.sample(doors.take(2), max_tokens=2)
            run.encode(doors.take(1)[0])

        with monkeypatch.context() as patch:
            patch.setattr(BigramSession, method, quote)
            doors.expect_refusal(use)
            assert reached, method
        with contextlib.suppress(TGTinkerError):
            run.optim_step().result()  # drops what the crash left


def said_to_others(doors: Doors, dataset: str, artifact: str) -> Iterator[tuple[str, bytes]]:
    """What the tenant's auditors and partners are given."""
    service = doors.service
    for name in (dataset, "trained"):
        report = service.get_privacy_report(name)
        yield f"report of {name}", json.dumps(report).encode()
        yield f"page of {name}", render(report).encode()
        yield f"signed report of {name}", service.get_signed_report(name)
        yield f"ledger of {name}", "\n".join(e.to_json() for e in service.get_privacy_ledger(name).entries).encode()
    yield "audit log", repr(service.get_audit_logs(limit=1000)).encode()
    identity = pyrage.x25519.Identity.generate()
    exported = doors.folder / "export.age"
    service.export_artifact(artifact, str(identity.to_public()), exported)
    yield "export", pyrage.decrypt(exported.read_bytes(), [identity])


def files(*folders: Path) -> Iterator[tuple[str, bytes]]:
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                yield str(path.relative_to(folder.parent)), path.read_bytes()


def found_in(places: Mapping[str, bytes]) -> dict[str, set[tuple[str, str]]]:
    searcher = Searcher(ALL)
    different = {data: place for place, data in places.items()}
    hits = {place: searcher.search(data) for data, place in different.items()}
    return {place: hit for place, hit in hits.items() if hit}


@pytest.fixture
def client_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "client"
    monkeypatch.setenv("TG_TINKER_DATA_DIR", str(folder))
    return folder


@pytest.fixture
def doors(tmp_path: Path, client_folder: Path) -> Iterator[Doors]:
    with contextlib.ExitStack() as closing:
        config = ServerConfig(port=0, backend="bigram", data_dir=tmp_path / "data")
        server = closing.enter_context(EmbeddedServer(config))
        configure_logging(level="debug", style="json")
        closing.callback(configure_logging, level="warning", style="console")
        key = server.mint_key("clinic")
        service = closing.enter_context(ServiceClient(base_url=server.address, api_key=key, timeout=30))
        yield Doors(service, server, tmp_path, closing)


def test_a_thousand_markers_come_to_rest_nowhere(
    doors: Doors,
    tmp_path: Path,
    client_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("grpc").setLevel(logging.INFO)  # tells of event loops, by the ten thousand
    private = doors.run(dataset_id="trained")
    open_run = doors.run()
    train(doors, private, 160)
    train(doors, open_run, 80)
    send_texts(doors, private)
    artifact = save(doors, private)
    count_units(doors)
    dataset = register(doors)
    be_wrong(doors, private)
    crash(doors, open_run, monkeypatch)
    train(doors, private, len(doors.left) // 40 * 40)
    private.sample(doors.take(len(doors.left)), max_tokens=1)
    assert doors.refused > 60
    assert not doors.left

    places = dict(said_to_others(doors, dataset, artifact))
    while_running = dict(files(tmp_path / "data", client_folder))
    doors.closing.close()
    after = {f"{name}, stopped": data for name, data in files(tmp_path / "data", client_folder)}
    out, err = capfd.readouterr()
    places |= (
        while_running | after | {"stdout": out.encode(), "stderr": err.encode(), "logging": caplog.text.encode()}
    )
    assert found_in(places) == {}
    kinds = {Path(name.removesuffix(", stopped")).suffix for name in places}
    assert {".db", ".db-wal"} <= kinds  # while it ran, the newest pages were in the log alone
    assert out.count("operation_crashed") >= 3
    assert out.count('"level": "debug"') > 100


def test_a_name_that_is_not_sealed_is_found(doors: Doors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SealedText, "seal", lambda self, tenant, purpose, text, context: text)
    doors.run().save_state(name=ALL[0])
    found = found_in(dict(files(tmp_path / "data")))
    assert {marker for hit in found.values() for _, marker in hit} == {ALL[0]}


def test_a_log_line_that_quotes_is_found(
    doors: Doors, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    compute = BigramSession._compute

    def chatty(self: BigramSession, request: Any) -> Any:
        structlog.get_logger().debug("pass", ids=request.input_ids_BT.tolist())
        return compute(self, request)

    monkeypatch.setattr(BigramSession, "_compute", chatty)
    doors.run().forward_backward({"input_ids": ids(ALL[:2])}).result()
    found = found_in({"stdout": capfd.readouterr().out.encode()})
    assert {marker for _, marker in found["stdout"]} == set(ALL[:2])


def test_a_crash_that_is_logged_with_its_text_is_found(
    doors: Doors, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(crashes, "place_of", str)
    crash(doors, doors.run(), monkeypatch)
    assert "stdout" in found_in({"stdout": capfd.readouterr().out.encode()})

"""Imports of exports that are slow, given up, too large or interrupted: nobody else notices, nothing is half-done."""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import rfc8785

from tests.support.exports import CLAIM, SIGNER, archive, files, source
from tg_tinker import ServiceClient
from tg_tinker.errors import FutureCancelledError, InvalidRequestError, TGTinkerError
from tg_tinker.proto.v1 import artifacts_pb2
from tg_tinker.reports.statement import PAYLOAD_TYPE
from tg_tinker.transparency import note
from tg_tinker.wire import requests
from tg_tinker.wire.methods import method_of
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.artifacts.vault import Vault
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.service import imports, uploads
from tg_tinker_server.store import audit_rows

SMALL = archive()


@pytest.fixture
def config(tmp_path: Path) -> ServerConfig:
    return ServerConfig(port=0, backend="bigram", data_dir=tmp_path / "data")


@pytest.fixture
def server(config: ServerConfig) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(config) as running:
        yield running


def take(service: ServiceClient, data: bytes = SMALL) -> str:
    pieces = [data[i : i + 2**20] for i in range(0, len(data), 2**20)]
    return service._transport.upload(requests.import_artifact(SIGNER.verifier_key, pieces)).artifact.artifact_id


def begin(server: EmbeddedServer, key: str, pieces: Iterator[bytes]) -> Any:
    """An import with the bare protocol, whose pieces come as they like."""

    def stream() -> Iterator[bytes]:
        yield artifacts_pb2.ImportArtifactRequest(signer=SIGNER.verifier_key).SerializeToString()
        for piece in pieces:
            yield artifacts_pb2.ImportArtifactRequest(data=piece).SerializeToString()

    call = grpc.insecure_channel(server.address).stream_unary(method_of(artifacts_pb2.ImportArtifactRequest).path)
    return call.future(stream(), metadata=[("authorization", f"Bearer {key}")], timeout=60)


def ciphertexts(config: ServerConfig) -> list[str]:
    return [p.name for p in config.resolved_artifacts_dir.iterdir() if not p.name.endswith(".lock")]


def test_whoever_sends_slowly_keeps_only_imports_of_the_own_tenant_waiting(server: EmbeddedServer) -> None:
    evil, done = server.mint_key("evil"), threading.Event()

    def dripping() -> Iterator[bytes]:
        while not done.wait(0.05):
            yield b""

    slow = [begin(server, evil, dripping()) for _ in range(3 * uploads.MOST_PER_TENANT)]
    time.sleep(0.3)  # their places are taken
    with ServiceClient(server.mint_key("good"), server.address) as service:
        assert take(service).startswith("ckpt_")
    assert not any(call.done() for call in slow)
    done.set()
    assert {call.code() for call in slow} == {grpc.StatusCode.INVALID_ARGUMENT}
    with ServiceClient(evil, server.address) as service:  # and the places are free again
        assert take(service).startswith("ckpt_")


def received(pieces: list[tuple[float, bytes]], monkeypatch: pytest.MonkeyPatch, *, patience_s: float = 0.2) -> bytes:
    """What comes through of pieces, each after a pause."""
    monkeypatch.setattr(uploads, "PATIENCE_S", patience_s)
    monkeypatch.setattr(uploads, "SLOWEST_BYTES_PER_S", 100)

    async def data() -> AsyncIterator[bytes]:
        for pause_s, piece in pieces:
            await asyncio.sleep(pause_s)
            yield piece

    async def main() -> bytes:
        source = uploads.from_loop(asyncio.get_running_loop(), data(), "export")
        return await asyncio.to_thread(lambda: b"".join(source))

    return asyncio.run(main())


def test_pieces_may_pause_as_long_as_enough_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    steady = [(0.25, bytes(50))] * 8  # 2 s in all, twice the patience; 200 bytes a second
    assert received(steady, monkeypatch, patience_s=1.0) == bytes(400)


@pytest.mark.parametrize(
    "pieces",
    [
        [(0.05, b"")] * 100,
        [(0.05, b"x")] * 100,
        [(0.0, bytes(10_000)), (60.0, b"x")],  # much came, and then nothing
    ],
    ids=["empty", "slow", "a long pause"],
)
def test_pieces_that_come_too_slowly_end_the_import(
    pieces: list[tuple[float, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    began = time.monotonic()
    with pytest.raises(InvalidRequestError, match="too slowly"):
        received(pieces, monkeypatch)
    assert time.monotonic() - began < 30.0


def test_a_caller_who_is_gone_ends_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    async def gone() -> AsyncIterator[bytes]:
        yield b"x"
        raise asyncio.CancelledError

    async def main() -> None:
        source = uploads.from_loop(asyncio.get_running_loop(), gone(), "export")
        await asyncio.to_thread(list, source)

    with pytest.raises(FutureCancelledError):
        asyncio.run(main())


def test_a_signer_of_another_kind_of_name_is_refused_and_not_repeated_in_the_audit_log(
    server: EmbeddedServer,
) -> None:
    named = note.VerifierKey("the-patient-has", SIGNER.public_key).text
    with ServiceClient(server.mint_key(), server.address) as service:
        with pytest.raises(InvalidRequestError, match="not named after a log"):
            service._transport.upload(requests.import_artifact(named, [SMALL]))
        assert service.get_audit_logs(operation="import_artifact") == []


def test_an_import_and_its_record_are_there_together_or_not_at_all(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = audit_rows.insert_record

    def broken(tx: Any, row: Any) -> None:
        real(tx, row)
        raise OSError("the power is gone")

    with EmbeddedServer(config) as server, ServiceClient(server.mint_key(), server.address) as service:
        monkeypatch.setattr(audit_rows, "insert_record", broken)
        with pytest.raises(TGTinkerError):
            take(service)
        monkeypatch.setattr(audit_rows, "insert_record", real)
        assert service.list_artifacts() == []
        assert service.get_audit_logs(operation="import_artifact") == []
        kept = take(service)
        (record,) = service.get_audit_logs(operation="import_artifact")
        assert (record.success, record.artifact_ids) == (True, [kept])
    with EmbeddedServer(config):
        assert ciphertexts(config) == [kept]


def test_an_import_that_is_given_up_at_the_last_moment_is_noted_and_leaves_nothing(
    server: EmbeddedServer, config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed, gone = threading.Event(), threading.Event()
    real = Vault.seal_plain

    def slow(self: Vault, **named: Any) -> Any:
        made = real(self, **named)
        if named["kind"] == "checkpoint":
            sealed.set()
            assert gone.wait(10)
        return made

    monkeypatch.setattr(Vault, "seal_plain", slow)
    call = begin(server, server.mint_key(), iter([SMALL]))
    assert sealed.wait(10)
    assert len(ciphertexts(config)) == 1
    call.cancel()
    time.sleep(0.3)  # until the server knows
    gone.set()
    with ServiceClient(server.mint_key(), server.address) as service:
        record = until(lambda: service.get_audit_logs(operation="import_artifact"))[0]
        assert (record.success, record.error_code) == (False, "FUTURE_CANCELLED")
        assert service.list_artifacts() == []
    assert ciphertexts(config) == []


def until(found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 10
    while not (value := found()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return value


def reporting(envelope: bytes) -> bytes:
    return archive(files(replace(source(ledger=CLAIM), report={"report.json": envelope, "report.html": b""})))


def dense(count: int) -> bytes:
    payload = b'{"a":[' + b",".join([b"[]"] * count) + b"]}"
    return bytes(rfc8785.dumps(SIGNER.sign_dsse(PAYLOAD_TYPE, payload)))


def test_a_report_of_more_values_than_a_server_reads_is_refused_unread(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(_: bytes, *__: Any) -> None:
        raise AssertionError("it was parsed")

    with ServiceClient(server.mint_key(), server.address) as service:
        with pytest.raises(InvalidRequestError, match="format"):  # few enough to be read, and no report
            take(service, reporting(dense(1000)))
        monkeypatch.setattr("tg_tinker.reports.verdicts.parse_canonical", read)
        with pytest.raises(InvalidRequestError, match="over the 1,000,000"):
            take(service, reporting(dense(500_001)))
        outside = b'{"payload":"' + base64.b64encode(b"{}") + b'","z":[' + b",".join([b"[]"] * 100) + b"]}"
        for bad in (outside, b"{", b'{"payload":7}', b'{"payload":"#"}', b"[1]"):
            with pytest.raises(InvalidRequestError, match="not a signed envelope"):
                take(service, reporting(bad))
        large = bytes(imports.LARGEST["report.json"] + 1)
        with pytest.raises(InvalidRequestError, match=r"report\.json has 25,165,825 bytes, over"):
            take(service, reporting(large))

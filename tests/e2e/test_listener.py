"""The listener: TLS with and without client certificates, health, reflection, a drain that loses nothing."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.e2e.server_process import ServerProcess, batch
from tg_tinker import InvalidRequestError, ServiceClient, TGTinkerError, TrainingConfig
from tg_tinker.wire.methods import methods
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig


class Party:
    """A certificate and its key as PEM files; signed by an issuer or by itself."""

    def __init__(self, folder: Path, name: str, issuer: Party | None = None) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.now(UTC)
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(self.subject)
            .issuer_name(issuer.subject if issuer else self.subject)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(issuer.key if issuer else self.key, hashes.SHA256())
        )
        self.cert_file, self.key_file = folder / f"{name}.pem", folder / f"{name}.key"
        self.cert_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        self.key_file.write_bytes(
            self.key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )


@pytest.fixture(params=[False, True], ids=["tls", "mutual-tls"])
def guarded(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[EmbeddedServer, dict[str, Party]]]:
    ca, foreign = Party(tmp_path, "ca"), Party(tmp_path, "foreign")
    parties = {
        "ca": ca,
        "foreign": foreign,
        "server": Party(tmp_path, "server", ca),
        "client": Party(tmp_path, "client", ca),
        "stranger": Party(tmp_path, "stranger", foreign),
    }
    config = ServerConfig(
        port=0,
        backend="bigram",
        data_dir=tmp_path / "data",
        tls_cert=parties["server"].cert_file,
        tls_key=parties["server"].key_file,
        tls_client_ca=ca.cert_file if request.param else None,
    )
    with EmbeddedServer(config) as server:
        yield server, {**parties, **({"mutual": ca} if request.param else {})}


def ask(
    monkeypatch: pytest.MonkeyPatch, server: EmbeddedServer, scheme: str, ca: Party | None, me: Party | None
) -> str:
    for name, path in (
        ("CA", ca and ca.cert_file),
        ("CERT", me and me.cert_file),
        ("KEY", me and me.key_file),
    ):
        monkeypatch.delenv(f"TG_TINKER_TLS_{name}", raising=False)
        if path:
            monkeypatch.setenv(f"TG_TINKER_TLS_{name}", str(path))
    url = f"{scheme}://{server.address}"
    with ServiceClient(api_key=server.mint_key("tenant-a"), base_url=url, retry_count=0, timeout=30) as client:
        return client.get_server_capabilities().tenant_id


def test_only_the_right_certificates_get_through(
    guarded: tuple[EmbeddedServer, dict[str, Party]], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, parties = guarded
    mutual = "mutual" in parties
    assert ask(monkeypatch, server, "grpcs", parties["ca"], parties["client"] if mutual else None) == "tenant-a"
    refused: list[tuple[str, Party | None, Party | None]] = [
        ("grpcs", parties["foreign"], parties["client"] if mutual else None),
        ("grpcs", None, None),
        ("grpc", None, None),
    ]
    if mutual:
        refused += [("grpcs", parties["ca"], None), ("grpcs", parties["ca"], parties["stranger"])]
    for scheme, ca, me in refused:
        with pytest.raises(TGTinkerError):
            ask(monkeypatch, server, scheme, ca, me)


def test_certificates_that_do_not_fit_together_are_named(tmp_path: Path) -> None:
    one, two = Party(tmp_path, "one"), Party(tmp_path, "two")
    with pytest.raises(InvalidRequestError, match="TLS files"):
        EmbeddedServer(
            ServerConfig(
                port=0, backend="bigram", data_dir=tmp_path / "d", tls_cert=one.cert_file, tls_key=two.key_file
            )
        ).start()
    with pytest.raises(ValueError, match="without TLS"):
        ServerConfig(host="0.0.0.0")


def test_health_and_reflection_answer_without_a_key(tmp_path: Path) -> None:
    with EmbeddedServer(ServerConfig(port=0, backend="bigram", data_dir=tmp_path)) as server:
        channel = grpc.insecure_channel(server.address)
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "tg_tinker.v1.TrainingService"):
            assert health.Check(health_pb2.HealthCheckRequest(service=name)).status == 1  # SERVING
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        (answer,) = list(stub.ServerReflectionInfo(iter([asked])))
        listed = {s.name for s in answer.list_services_response.service}
        assert {m.service for m in methods()} <= listed


def test_a_drained_server_hands_over_to_the_next_one(tmp_path: Path) -> None:
    with ServerProcess(tmp_path) as server, server.client(timeout=60) as service:
        client = service.create_training_client(TrainingConfig(model_ref="bigram", batch_size=4))
        futures = []
        for seed in range(40):
            client.forward_backward(batch(seed))
            futures.append(client.optim_step())
        assert server.terminate() == 0
        server.start().wait_until_up()
        assert [f.result(timeout=60).step for f in futures] == list(range(1, 41))

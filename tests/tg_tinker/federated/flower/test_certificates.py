"""Certificates that strict readers take, and node keys that Flower takes."""

from __future__ import annotations

import shutil
import socket
import ssl
import stat
import subprocess
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker.federated.flower.certificates import make_authority, make_node_key, make_server_certificate


def authority(folder: Path, name: str = "ca") -> tuple[Path, Path]:
    make_authority(folder / f"{name}.crt", folder / f"{name}.key")
    return folder / f"{name}.crt", folder / f"{name}.key"


def server(folder: Path, ca: tuple[Path, Path], hosts: list[str]) -> tuple[Path, Path]:
    paths = folder / "server.pem", folder / "server.key"
    make_server_certificate(*paths, authority=ca[0], authority_key=ca[1], hosts=hosts)
    return paths


def handshake(server_files: tuple[Path, Path], ca: Path, name: str) -> None:
    """TLS between Python's own ends, as strict as OpenSSL can be."""
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(*server_files)
    theirs = ssl.create_default_context(cafile=str(ca))
    theirs.verify_flags |= ssl.VERIFY_X509_STRICT
    a, b = socket.socketpair()

    def serve() -> None:
        try:
            ours.wrap_socket(a, server_side=True).close()
        except OSError:
            a.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        theirs.wrap_socket(b, server_hostname=name).close()
    finally:
        b.close()
        thread.join()


@pytest.mark.parametrize("name", ["link.example.org", "127.0.0.1", "::1"])
def test_a_strict_client_accepts_the_names_in_the_certificate(tmp_path: Path, name: str) -> None:
    ca = authority(tmp_path)
    handshake(server(tmp_path, ca, ["link.example.org", "127.0.0.1", "::1"]), ca[0], name)


def test_another_name_or_another_authority_is_refused(tmp_path: Path) -> None:
    ca, other = authority(tmp_path), authority(tmp_path, "other")
    files = server(tmp_path, ca, ["link.example.org"])
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(files, ca[0], "elsewhere.example.org")
    with pytest.raises(
        ssl.SSLCertVerificationError, match=r"unable to get local issuer|self-signed|signature failure"
    ):
        handshake(files, other[0], "link.example.org")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl, as the second reader")
def test_openssl_verifies_the_chain_strictly(tmp_path: Path) -> None:
    ca = authority(tmp_path)
    files = server(tmp_path, ca, ["link.example.org"])
    said = subprocess.run(
        ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", ca[0], files[0]],
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr


def test_private_halves_are_private_and_nothing_is_overwritten(tmp_path: Path) -> None:
    ca = authority(tmp_path)
    files = server(tmp_path, ca, ["localhost"])
    make_node_key(tmp_path / "node")
    for private in (ca[1], files[1], tmp_path / "node"):
        assert stat.S_IMODE(private.stat().st_mode) == 0o600
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for again in (
        lambda: authority(tmp_path),
        lambda: server(tmp_path, ca, ["localhost"]),
        lambda: make_node_key(tmp_path / "node"),
    ):
        with pytest.raises(InvalidRequestError, match="is left as it is"):
            again()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_no_half_of_a_pair_is_made(tmp_path: Path) -> None:
    ca = authority(tmp_path, "whole")
    for name in ("ca.crt", "server.pem", "node.pub"):
        (tmp_path / name).write_text("mine")
    for make in (
        lambda: authority(tmp_path),
        lambda: server(tmp_path, ca, ["localhost"]),
        lambda: make_node_key(tmp_path / "node"),
    ):
        with pytest.raises(InvalidRequestError, match="is left as it is"):
            make()
    assert not [name for name in ("ca.key", "server.key", "node") if (tmp_path / name).exists()]


def test_a_node_key_is_p384_in_openssh_form(tmp_path: Path) -> None:
    public = make_node_key(tmp_path / "node")
    assert public == tmp_path / "node.pub"
    private = load_ssh_private_key((tmp_path / "node").read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert isinstance(private.curve, ec.SECP384R1)
    assert load_ssh_public_key(public.read_bytes()) == private.public_key()


def test_what_cannot_be_made_is_said(tmp_path: Path) -> None:
    ca, other = authority(tmp_path), authority(tmp_path, "other")
    with pytest.raises(InvalidRequestError, match="at least one name"):
        server(tmp_path, ca, [])
    with pytest.raises(InvalidRequestError, match="is not the key of"):
        server(tmp_path, (ca[0], other[1]), ["localhost"])
    with pytest.raises(InvalidRequestError, match="cannot read"):
        server(tmp_path, (tmp_path / "nothing", ca[1]), ["localhost"])
    with pytest.raises((ServerError, InvalidRequestError)):
        make_node_key(tmp_path / "ca.crt" / "node")


@pytest.mark.parametrize(
    "host",
    [
        "münchen.example",
        "https://c.example.org:8000",
        "c.example.org:8000",
        "",
        "-a.example",
        "a..b",
        "300.1.1.1",
        "a_b",
    ],
)
def test_a_host_that_is_none_is_refused_before_anything_is_written(tmp_path: Path, host: str) -> None:
    ca = authority(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InvalidRequestError, match="neither a host name nor an IP address"):
        server(tmp_path, ca, ["localhost", host])
    assert sorted(tmp_path.iterdir()) == before


def test_an_a_label_is_a_host(tmp_path: Path) -> None:
    ca = authority(tmp_path)
    handshake(server(tmp_path, ca, ["xn--mnchen-3ya.example"]), ca[0], "xn--mnchen-3ya.example")

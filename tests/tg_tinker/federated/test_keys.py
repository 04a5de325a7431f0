"""Identities: files that only their owner reads, and public keys as text."""

from __future__ import annotations

import base64
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from pydantic import TypeAdapter

from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker.federated.job import PublicKey
from tg_tinker.federated.keys import load_identity, make_identity, public_key, public_text


def test_a_key_is_loaded_as_it_was_made(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "site.key"
    made = make_identity(path)
    assert load_identity(path).private_bytes_raw() == made.private_bytes_raw()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["site.key"]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl, as the second reader")
def test_openssl_reads_the_same_public_key(tmp_path: Path) -> None:
    key = make_identity(tmp_path / "site.key")
    der = subprocess.run(
        ["openssl", "pkey", "-in", tmp_path / "site.key", "-pubout", "-outform", "DER"],
        capture_output=True,
        check=True,
    ).stdout
    assert base64.b64encode(der[-32:]).decode() == public_text(key)


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "site.key"
    path.write_bytes(b"precious")
    with pytest.raises(InvalidRequestError, match="never overwritten"):
        make_identity(path)
    assert path.read_bytes() == b"precious"
    assert [p.name for p in tmp_path.iterdir()] == ["site.key"]


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ServerError, match="name a writable folder"):
        make_identity(tmp_path / "file" / "site.key")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610])
def test_a_file_that_others_can_open_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "site.key"
    make_identity(path)
    os.chmod(path, mode)
    with pytest.raises(InvalidRequestError, match=f"mode {mode:04o}.*chmod 600"):
        load_identity(path)


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
)
def test_what_is_no_key_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "site.key"
    path.touch(0o600)
    path.write_bytes(content)
    with pytest.raises(InvalidRequestError, match="holds no unencrypted private key"):
        load_identity(path)


def test_an_encrypted_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "site.key"
    path.touch(0o600)
    key = make_identity(tmp_path / "plain.key")
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")))
    with pytest.raises(InvalidRequestError, match="unencrypted"):
        load_identity(path)


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "site.key"
    path.touch(0o600)
    path.write_bytes(
        generate_private_key(SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    with pytest.raises(InvalidRequestError, match="not an Ed25519 key"):
        load_identity(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="keygen"):
        load_identity(tmp_path / "nothing.key")
    with pytest.raises(InvalidRequestError, match=r"cannot read|not a key file"):
        load_identity(tmp_path)


def test_public_text_is_what_a_roster_holds_and_reads_back(tmp_path: Path) -> None:
    key = make_identity(tmp_path / "site.key")
    text = public_text(key)
    assert TypeAdapter(PublicKey).validate_python(text) == text
    assert public_text(public_key(text)) == text
    public_key(text).verify(key.sign(b"x"), b"x")


@pytest.mark.parametrize("text", ["", "A" * 44, "é" * 44, "A" * 43, "A" * 42 + "B=", "A" * 43 + "=\n"])
def test_what_is_no_public_text_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="not a public key"):
        public_key(text)

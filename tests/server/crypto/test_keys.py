"""A root key comes from where it was said, whole, and reachable by its owner only."""

from __future__ import annotations

import base64
import errno
import os
import pickle
import stat
from pathlib import Path

import pytest

from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker_server.crypto.aead import DecryptionError
from tg_tinker_server.crypto.keys import LocalKeyProvider, create_key_file, key_provider

TEXT = base64.b64encode(bytes(range(32))).decode()


def test_a_created_file_has_mode_0600_and_is_a_provider(tmp_path: Path) -> None:
    path = tmp_path / "new" / "root.key"
    create_key_file(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["root.key"]
    wrapped = key_provider(f"file:{path}").wrap(bytes(32), b"a")
    assert key_provider(f"file:{path}").unwrap(wrapped, b"a") == bytes(32)


def test_two_created_keys_differ(tmp_path: Path) -> None:
    create_key_file(tmp_path / "a")
    create_key_file(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() != (tmp_path / "b").read_bytes()


def test_an_existing_key_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "root.key"
    create_key_file(path)
    before = path.read_bytes()
    with pytest.raises(InvalidRequestError, match="never overwritten"):
        create_key_file(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["root.key"]


@pytest.mark.parametrize("call", ["fsync", "link"])
def test_a_failed_creation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(ServerError, match="No space left"):
        create_key_file(tmp_path / "root.key")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_not_created_by_reading(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="tg-tinker keys init"):
        key_provider(f"file:{tmp_path / 'root.key'}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o602, 0o610, 0o666])
def test_a_file_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "root.key"
    create_key_file(path)
    path.chmod(mode)
    with pytest.raises(InvalidRequestError, match=f"mode {mode:04o}.*chmod 600"):
        key_provider(f"file:{path}")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="cannot read the key file"):
        key_provider(f"file:{tmp_path}")


def test_an_environment_variable_holds_base64_of_32_bytes() -> None:
    provider = key_provider("env:ROOT", {"ROOT": f"{TEXT}\n"})
    assert LocalKeyProvider(bytes(range(32))).unwrap(provider.wrap(b"k" * 32, b"a"), b"a") == b"k" * 32


@pytest.mark.parametrize("text", ["", "short", TEXT[:-4], TEXT + "AAAA", "*" + TEXT[1:], bytes(32).hex()])
def test_anything_but_base64_of_32_bytes_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="base64 of 32 bytes") as caught:
        key_provider("env:ROOT", {"ROOT": text})
    assert not text or text not in str(caught.value)


def test_an_unset_variable_is_named() -> None:
    with pytest.raises(InvalidRequestError, match="variable ROOT"):
        key_provider("env:ROOT", {})


@pytest.mark.parametrize("uri", ["", "file:", "env:", "awskms:x", TEXT, "/etc/root.key"])
def test_an_unknown_uri_is_refused_with_the_known_ones_and_not_repeated(uri: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"file:/path/to/root\.key, env:NAME or vault:") as caught:
        key_provider(uri)
    assert TEXT not in str(caught.value)


def test_a_wrapped_key_is_bound_to_root_key_and_associated_data() -> None:
    provider = LocalKeyProvider(bytes(32))
    wrapped = provider.wrap(b"k" * 32, b"a")
    with pytest.raises(DecryptionError):
        provider.unwrap(wrapped, b"b")
    with pytest.raises(DecryptionError):
        LocalKeyProvider(b"x" * 32).unwrap(wrapped, b"a")


def test_a_provider_shows_and_pickles_nothing() -> None:
    provider = LocalKeyProvider(b"secret-secret-secret-secret-1234")
    assert "secret" not in repr(provider)
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(provider)

"""The root key of a server, behind one URI: it wraps the key of every tenant and nothing else.

``file:/path`` is a file, ``env:NAME`` an environment variable; both hold base64 of 32 bytes. ``vault:https://...``
is a key in HashiCorp Vault (transit.py). Losing the root key loses every artifact; `create_key_file` is the only
thing here that makes one, and only when asked.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from tg_tinker.errors import InvalidRequestError
from tg_tinker.secret_files import read_secret, write_secret
from tg_tinker_server.crypto.aead import KEY_BYTES, associated_data, derive_key, new_key, open_sealed, seal
from tg_tinker_server.crypto.transit import SCHEME, TransitKeyProvider

FIELD = "root_key"


class KeyProvider(Protocol):
    """Holds a root key and wraps 32-byte keys under it; a key service can stand in for the local ones."""

    def wrap(self, key: bytes, aad: bytes) -> bytes:
        """Encrypt a key, bound to ``aad``."""
        ...

    def unwrap(self, wrapped: bytes, aad: bytes) -> bytes:
        """Undo `wrap`.

        Raises:
            DecryptionError: wrapped by another root key, for another ``aad``, or changed since.
        """
        ...


class LocalKeyProvider:
    """A root key in this process's memory."""

    __slots__ = ("_key",)

    def __init__(self, root_key: bytes) -> None:
        if len(root_key) != KEY_BYTES:
            raise ValueError(f"a root key has {KEY_BYTES} bytes, not {len(root_key)}")
        self._key = derive_key(root_key, associated_data("tg-tinker/root-key/wrap/v1"))

    def wrap(self, key: bytes, aad: bytes) -> bytes:
        """Encrypt a key, bound to ``aad``: 60 bytes for 32."""
        return seal(self._key, key, associated_data("tg-tinker/wrapped-key/v1", aad))

    def unwrap(self, wrapped: bytes, aad: bytes) -> bytes:
        """Undo `wrap`."""
        return open_sealed(self._key, wrapped, associated_data("tg-tinker/wrapped-key/v1", aad))

    def __repr__(self) -> str:
        return "LocalKeyProvider(...)"

    def __reduce__(self) -> str:
        raise TypeError("a root key is not pickled")


def key_provider(uri: str, environ: Mapping[str, str] = os.environ) -> KeyProvider:
    """The key provider of a URI, its key loaded and checked.

    Raises:
        InvalidRequestError: unknown scheme, missing or malformed key, or a key file others can reach.
    """
    scheme, separator, where = uri.partition(":")
    if separator and where and scheme == "file":
        return LocalKeyProvider(_read_key_file(Path(where)))
    if separator and where and scheme == "env":
        if where not in environ:
            raise _refused(f"the environment variable {where} with the root key is not set", "set")
        return LocalKeyProvider(_decode(environ[where], f"the environment variable {where}"))
    if separator and where and scheme == SCHEME:
        return TransitKeyProvider(where, environ)
    # The URI itself is not repeated: a key pasted here by mistake would land in a log.
    raise _refused(
        "the root key's URI is not understood; use file:/path/to/root.key, env:NAME or vault:https://...",
        "file:, env: or vault:",
    )


def create_key_file(path: Path) -> None:
    """Make a new root key in a file that only its owner can read.

    The file appears whole or not at all, and is on disk when this returns.

    Raises:
        InvalidRequestError: the file exists; nothing is ever overwritten.
        ServerError: it cannot be written.
    """
    write_secret(path, base64.b64encode(new_key()) + b"\n")


def _read_key_file(path: Path) -> bytes:
    made = "create one with `tg-tinker keys init`, or restore the one that was there"
    return _decode(read_secret(path, if_missing=made).decode("ascii", "replace"), str(path))


def _decode(text: str, where: str) -> bytes:
    try:
        key = base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != KEY_BYTES:
        raise _refused(
            f"{where} does not hold base64 of {KEY_BYTES} bytes; make one with: openssl rand -base64 32",
            "base64 of 32 bytes",
        ) from None
    return key


def _refused(message: str, constraint: str) -> InvalidRequestError:
    return InvalidRequestError(message, field=FIELD, constraint=constraint)

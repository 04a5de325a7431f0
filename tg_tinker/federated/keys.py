"""A party's identity: the Ed25519 key that signs its messages, kept in a file that only its owner can read.

The file is PEM, PKCS #8 (RFC 5958, RFC 8410), unencrypted: `openssl pkey -in site.key -pubout` opens it.
"""

from __future__ import annotations

import base64
import binascii
import os
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from tg_tinker import secret_files
from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker.secret_files import require_new, write_secret

__all__ = [
    "load_identity",
    "make_identity",
    "public_key",
    "public_text",
    "read_secret",
    "require_new",
    "write_public",
    "write_secret",
]

_PUBLIC_BYTES = 32


def make_identity(path: Path) -> Ed25519PrivateKey:
    """Make a new key and write it to a new file with mode 0600.

    The file appears whole or not at all, and is on disk when this returns.

    Raises:
        InvalidRequestError: the file exists; nothing is ever overwritten.
        ServerError: it cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    write_secret(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return key


def load_identity(path: Path) -> Ed25519PrivateKey:
    """The key in a file.

    Raises:
        InvalidRequestError: no such file, others than its owner can read or write it, or it holds no Ed25519 key.
    """
    try:
        key = load_pem_private_key(read_secret(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise _refused(
            f"{path} holds no unencrypted private key in PEM; `tg-tinker federated keygen` makes one", "PEM, PKCS #8"
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise _refused(f"the key in {path} is not an Ed25519 key; messages are signed with Ed25519 only", "Ed25519")
    return key


def public_text(key: Ed25519PrivateKey | Ed25519PublicKey) -> str:
    """The raw public key in base64, as a job's roster holds it (`job.PublicKey`)."""
    public = key.public_key() if isinstance(key, Ed25519PrivateKey) else key
    return base64.b64encode(public.public_bytes_raw()).decode("ascii")


def public_key(text: str) -> Ed25519PublicKey:
    """The key that `public_text` wrote.

    Raises:
        InvalidRequestError: this is no such text.
    """
    try:
        raw = base64.b64decode(text.encode("ascii"), validate=True)
        if len(raw) != _PUBLIC_BYTES or base64.b64encode(raw).decode("ascii") != text:
            raise ValueError
        return Ed25519PublicKey.from_public_bytes(raw)
    except (ValueError, binascii.Error):
        raise _refused(
            f"{text[:60]!r} is not a public key; it is 44 characters of base64, as `tg-tinker federated keygen` "
            "prints it",
            "32 bytes in base64",
        ) from None


def write_public(path: Path, content: bytes) -> None:
    """Write a new file that everybody may read.

    Raises:
        InvalidRequestError: the file exists; nothing is ever overwritten.
        ServerError: it cannot be written.
    """
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644), "wb") as file:
            file.write(content)
    except FileExistsError:
        raise _refused(f"{path} exists and is left as it is", "a new file") from None
    except OSError as e:
        raise ServerError(f"cannot write {path}: {e.strerror}; name a writable folder") from e


def read_secret(path: Path) -> bytes:
    """The content of a party's file that only its owner can read.

    Raises:
        InvalidRequestError: see `secret_files.read_secret`.
    """
    return secret_files.read_secret(path, if_missing=f"`tg-tinker federated keygen {path}` makes one")


def _refused(message: str, constraint: str) -> InvalidRequestError:
    return InvalidRequestError(message, field="key", constraint=constraint)

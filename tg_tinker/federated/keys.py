"""A party's identity: the Ed25519 key that signs its messages, kept in a file that only its owner can read.

The file is PEM, PKCS #8 (RFC 5958, RFC 8410), unencrypted: `openssl pkey -in site.key -pubout` opens it.
"""

from __future__ import annotations

import base64
import binascii
import os
import secrets
import stat
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from tg_tinker.errors import InvalidRequestError, ServerError

_PUBLIC_BYTES = 32
_LARGEST_FILE = 10_000


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


def require_new(*paths: Path) -> None:
    """Require that none of these files exists, before the first of them is written.

    Raises:
        InvalidRequestError: one does.
    """
    for path in paths:
        if os.path.lexists(path):
            raise _refused(f"{path} exists and is left as it is; a key is never overwritten", "a new file")


def write_secret(path: Path, content: bytes) -> None:
    """Write a new file with mode 0600, whole and on disk or not at all.

    Raises:
        InvalidRequestError: the file exists; nothing is ever overwritten.
        ServerError: it cannot be written.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.link(draft, path)  # unlike rename, refuses to replace
        finally:
            draft.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as e:
        if os.path.lexists(path):
            raise _refused(f"{path} exists and is left as it is; a key is never overwritten", "a new file") from None
        raise ServerError(f"cannot create the key file {path}: {e.strerror}; name a writable folder") from e


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
    """The content of a file that only its owner can read.

    Raises:
        InvalidRequestError: no such file, or others than its owner can read or write it.
    """
    try:
        with path.open("rb") as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode) or info.st_size > _LARGEST_FILE:
                raise _refused(f"{path} is not a key file", "a regular file")
            if info.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                mode = f"{stat.S_IMODE(info.st_mode):04o}"
                raise _refused(
                    f"{path} has mode {mode}: others on this computer can read or change the key; "
                    f"run `chmod 600 {path}`, and make a new key if somebody may have read it",
                    "mode 0600",
                )
            return file.read()
    except OSError as e:
        raise _refused(
            f"cannot read the key file {path}: {e.strerror}; `tg-tinker federated keygen {path}` makes one",
            "a readable file",
        ) from e


def _refused(message: str, constraint: str) -> InvalidRequestError:
    return InvalidRequestError(message, field="key", constraint=constraint)

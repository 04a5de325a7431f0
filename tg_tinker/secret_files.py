"""Files that hold keys: new ones appear whole, with mode 0600, and never over an old one; others' are not read."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from tg_tinker.errors import InvalidRequestError, ServerError

_LARGEST_BYTES = 10_000


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
        require_new(path)
        raise ServerError(f"cannot create the key file {path}: {e.strerror}; name a writable folder") from e


def read_secret(path: Path, *, if_missing: str) -> bytes:
    """The content of a file that only its owner can read.

    Args:
        if_missing: what to do where there is none, e.g. which command makes it.

    Raises:
        InvalidRequestError: no such file, or others than its owner can read or write it.
    """
    try:
        with path.open("rb") as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode) or info.st_size > _LARGEST_BYTES:
                raise _refused(f"{path} is not a key file", "a regular file")
            if info.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                mode = f"{stat.S_IMODE(info.st_mode):04o}"
                raise _refused(
                    f"{path} has mode {mode}: others on this computer can read or change the key; "
                    f"run `chmod 600 {path}`, and make a new key if somebody may have read it",
                    "mode 0600",
                )
            return file.read()
    except FileNotFoundError:
        raise _refused(f"there is no key file {path}; {if_missing}", "an existing file") from None
    except OSError as e:
        raise _refused(f"cannot read the key file {path}: {e.strerror}", "a readable file") from e


def _refused(message: str, constraint: str) -> InvalidRequestError:
    return InvalidRequestError(message, field="key", constraint=constraint)

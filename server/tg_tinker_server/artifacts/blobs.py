"""Where ciphertext lies: whole blobs under ids the server minted, in a local folder or in memory."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from tg_tinker.errors import ServerError

CHUNK_BYTES = 2**20
# No dot, slash, upper case or NUL from outside: nothing here can climb out of a folder or collide on a file
# system that ignores case.
NAME = re.compile(r"[a-z]{1,15}_[0-9a-f]{8,64}(\.slots)?", re.ASCII)
DRAFT_PREFIX = ".draft-"

Bytes = bytes | bytearray | memoryview


class BlobNotFoundError(KeyError):
    """There is no such blob, or no blob can have this name."""


class BlobStore(Protocol):
    """Whole blobs by name. A reader sees all of a blob or none of it, whenever it looks."""

    def put(self, name: str, pieces: Iterable[Bytes], *, replace: bool = False) -> None:
        """Store a blob durably; a piece is used up before the next is asked for.

        If ``pieces`` raises, that error passes on and nothing is stored.

        Raises:
            BlobNotFoundError: not a name a server mints.
            ServerError: it could not be stored, or the name is taken and ``replace`` was not said.
        """
        ...

    def size(self, name: str) -> int:
        """Length in bytes; raises BlobNotFoundError."""
        ...

    def read(self, name: str) -> Iterator[bytes]:
        """The bytes in chunks of at most 1 MiB, as of this call, even if deleted meanwhile.

        Raises:
            BlobNotFoundError: no such blob.
            ServerError: it cannot be read; also while iterating.
        """
        ...

    def delete(self, name: str) -> None:
        """Forget a blob; no error if there is none. A power cut may bring it back: sweep `names` at start."""
        ...

    def names(self) -> list[str]:
        """All names, sorted."""
        ...

    def remove_drafts(self, *, older_than_s: float) -> int:
        """Remove what writers that died left behind; returns how many. Younger drafts may be at work."""
        ...


class LocalBlobs:
    """Blobs as files of one folder, readable by the server's user only.

    A blob is written to a draft, flushed to disk (fsync), renamed, and the folder flushed: after a crash or
    power cut a name holds a whole blob or nothing.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as e:
            raise ServerError(f"cannot use {root} for artifacts: {e.strerror}; name a writable folder") from e

    def put(self, name: str, pieces: Iterable[Bytes], *, replace: bool = False) -> None:
        """Store a blob durably."""
        path = self._path(name)
        draft = self._root / f"{DRAFT_PREFIX}{secrets.token_hex(16)}"
        renamed = False
        try:
            if not replace and path.exists():
                raise ServerError(f"{name} is stored already; ids are minted once and never reused")
            self._write(draft, pieces)
            os.rename(draft, path)
            renamed = True
            self._flush_folder()
        except OSError as e:
            if renamed and not replace:
                # The caller will be told that nothing was stored, so nothing may be.
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            raise ServerError(
                f"{name} could not be stored: {e.strerror}; check the disk of {self._root} and try again"
            ) from e
        finally:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)

    def size(self, name: str) -> int:
        """Length in bytes."""
        try:
            return self._path(name).stat().st_size
        except FileNotFoundError:
            raise BlobNotFoundError(name) from None
        except OSError as e:
            raise _unreadable(name, e) from e

    def read(self, name: str) -> Iterator[bytes]:
        """The bytes in chunks of at most 1 MiB."""
        try:
            file = self._path(name).open("rb", buffering=0)
        except FileNotFoundError:
            raise BlobNotFoundError(name) from None
        except OSError as e:
            raise _unreadable(name, e) from e

        def chunks() -> Iterator[bytes]:
            try:
                with file:
                    while chunk := file.read(CHUNK_BYTES):
                        yield chunk
            except OSError as e:
                raise _unreadable(name, e) from e

        return chunks()

    def delete(self, name: str) -> None:
        """Forget a blob."""
        try:
            self._path(name).unlink(missing_ok=True)
        except OSError as e:
            raise ServerError(f"{name} could not be deleted: {e.strerror}; try again") from e

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(p.name for p in self._root.iterdir() if NAME.fullmatch(p.name))

    def remove_drafts(self, *, older_than_s: float) -> int:
        """Remove what writers that died left behind."""
        oldest_s = time.time() - older_than_s
        drafts = [p for p in self._root.glob(f"{DRAFT_PREFIX}*") if p.stat().st_mtime <= oldest_s]
        for draft in drafts:
            draft.unlink(missing_ok=True)
        return len(drafts)

    def _path(self, name: str) -> Path:
        _check(name)
        return self._root / name

    def _write(self, draft: Path, pieces: Iterable[Bytes]) -> None:
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            for piece in pieces:
                rest = memoryview(piece)
                while rest:
                    rest = rest[os.write(fd, rest) :]
            os.fsync(fd)
        finally:
            os.close(fd)

    def _flush_folder(self) -> None:
        fd = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class MemoryBlobs:
    """Blobs that live as long as the process."""

    def __init__(self) -> None:
        self._blobs: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def put(self, name: str, pieces: Iterable[Bytes], *, replace: bool = False) -> None:
        """Store a blob."""
        _check(name)
        blob = bytearray()
        for piece in pieces:
            blob += piece
        with self._lock:
            if not replace and name in self._blobs:
                raise ServerError(f"{name} is stored already; ids are minted once and never reused")
            self._blobs[name] = bytes(blob)

    def size(self, name: str) -> int:
        """Length in bytes."""
        return len(self._get(name))

    def read(self, name: str) -> Iterator[bytes]:
        """The bytes in chunks of at most 1 MiB."""
        blob = self._get(name)
        return (blob[i : i + CHUNK_BYTES] for i in range(0, len(blob), CHUNK_BYTES))

    def delete(self, name: str) -> None:
        """Forget a blob."""
        _check(name)
        with self._lock:
            self._blobs.pop(name, None)

    def names(self) -> list[str]:
        """All names, sorted."""
        with self._lock:
            return sorted(self._blobs)

    def remove_drafts(self, *, older_than_s: float) -> int:  # noqa: ARG002 - a draft here dies with its writer
        """Nothing to remove."""
        return 0

    def _get(self, name: str) -> bytes:
        _check(name)
        with self._lock:
            if name not in self._blobs:
                raise BlobNotFoundError(name)
            return self._blobs[name]


def _check(name: str) -> None:
    if NAME.fullmatch(name) is None:
        raise BlobNotFoundError("not a name that a server mints")


def _unreadable(name: str, error: OSError) -> ServerError:
    return ServerError(f"{name} could not be read: {error.strerror}; check the disk and try again")

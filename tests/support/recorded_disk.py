"""A disk under SQLite that writes down what it was asked to do, and fails when told to.

A copy of SQLite's table of file functions is put before the real one: every call still goes to the real file, and
what changes a file is noted in order. No compiler is needed, only a Python that shares its SQLite library.
"""

from __future__ import annotations

import ctypes as c
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

from tests.support import sqlite_vfs as abi

Kind = Literal["write", "truncate", "sync", "delete", "map"]
Fault = Literal["EIO", "ENOSPC"]

# What SQLite's own functions answer to EIO (os_unix.c). A full disk has its own answer for writes alone.
_IOERR: Final = 10
_IOERR_OF: Final[dict[Kind, int]] = {"write": 3, "sync": 4, "truncate": 6, "delete": 10, "map": 19}
_FULL: Final = 13
_KEPT: Final[list[Any]] = []  # SQLite may call these until the process ends


@dataclass(frozen=True, slots=True)
class Op:
    """One thing that happened.

    Attributes:
        kind: "create", "write", "truncate", "sync" (a file's content is on disk), "sync-failed", "sync-folder" (all
            names are on disk), "delete", or "mark".
        name: of the file; for a mark, what it says.
        offset: of a write; the size of a truncation; of a "sync", how many operations were noted when it began.
    """

    kind: str
    name: str = ""
    offset: int = 0
    data: bytes = b""


class RecordedDisk:
    """What SQLite does to the files inside ``folder`` while the ``with`` block runs, and faults on demand.

    Shared memory (``-shm``) is not noted: SQLite rebuilds it. It is subject to faults where it needs more space.

    Attributes:
        ops: what happened, in order. An operation that failed is not in it, except for a flush and for the part of
            a write that reached the file.
        asked: which operations that can fail were asked for since the last :meth:`fail`.
        failed: which of them were made to.
    """

    def __init__(self, folder: Path) -> None:
        self.ops: list[Op] = []
        self.asked: list[tuple[Kind, str]] = []
        self.failed: list[tuple[Kind, str]] = []
        self._folder = str(folder.resolve()) + "/"
        self._choose: Callable[[int], bool] | None = None
        self._fault: Fault = "EIO"
        self._names: dict[int, str] = {}  # of open files, by address
        self._patched: dict[int, abi.Methods] = {}  # by address of the real methods
        self._flushed_folder = threading.local()
        self._errors: list[BaseException] = []

    def mark(self, text: str) -> None:
        """Note that something was said to the outside world."""
        self.ops.append(Op("mark", text))

    def fail(self, fault: Fault, choose: Callable[[int], bool]) -> None:
        """From now on the k-th operation that can fail (from 1) does, where ``choose(k)``."""
        self.asked, self.failed, self._fault, self._choose = [], [], fault, choose

    def heal(self) -> None:
        """No more faults."""
        self._choose = None

    def __enter__(self) -> Self:
        self._library = abi.library()
        self._real_at = self._library.sqlite3_vfs_find(None)
        self._real = abi.Vfs.from_address(self._real_at)
        self._mine = abi.Vfs.from_buffer_copy(self._real)
        self._mine.zName = f"recorded-{id(self):x}".encode()
        self._mine.xOpen = self._function(abi.OPEN, self._open)
        self._mine.xDelete = self._function(abi.DELETE, self._delete)
        self._watch_folder_flushes()
        assert self._library.sqlite3_vfs_register(c.addressof(self._mine), 1) == abi.OK
        _KEPT.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._library.sqlite3_vfs_unregister(c.addressof(self._mine))
        abi.SET_CALL(self._real.xSetSystemCall)(self._real_at, b"openDirectory", None)  # the built-in one again
        if self._errors and error is None:
            raise self._errors[0]

    def _function(self, prototype: Any, fn: Callable[..., int]) -> int:
        """The address of ``fn`` for SQLite. ctypes would turn an exception into 0, "all is well"."""

        def guarded(*args: Any) -> int:
            try:
                return fn(*args)
            except BaseException as e:  # kept for the end of the block
                self._errors.append(e)
                return _IOERR

        callback = prototype(guarded)
        _KEPT.append(callback)
        return int(c.cast(callback, c.c_void_p).value or 0)

    def _watch_folder_flushes(self) -> None:
        """SQLite flushes a folder right after opening it, and opens it for nothing else (os_unix.c)."""
        real = abi.OPEN_FOLDER(abi.GET_CALL(self._real.xGetSystemCall)(self._real_at, b"openDirectory"))

        def open_folder(path: bytes, descriptor: int) -> int:
            self._flushed_folder.yes = True
            return int(real(path, descriptor))

        mine = self._function(abi.OPEN_FOLDER, open_folder)
        assert abi.SET_CALL(self._real.xSetSystemCall)(self._real_at, b"openDirectory", mine) == abi.OK

    def _short(self, path: bytes | None) -> str | None:
        """The file's name in the folder, or None for files elsewhere."""
        text = (path or b"").decode()
        return text.removeprefix(self._folder) if text.startswith(self._folder) else None

    def _refused(self, kind: Kind, name: str) -> int:
        """What to answer instead of doing it, or 0."""
        if self._choose is None:
            return 0
        self.asked.append((kind, name))
        if not self._choose(len(self.asked)):
            return 0
        self.failed.append((kind, name))
        return _FULL if kind == "write" and self._fault == "ENOSPC" else _IOERR | _IOERR_OF[kind] << 8

    def _note_folder(self) -> None:
        if getattr(self._flushed_folder, "yes", False):
            self.ops.append(Op("sync-folder"))
        self._flushed_folder.yes = False

    # What SQLite calls.

    def _open(self, _vfs: int, path_at: int | None, file_at: int, flags: int, out_flags: int) -> int:
        path = c.string_at(path_at) if path_at else None
        name = self._short(path)
        new = name is not None and not Path(self._folder, name).exists()
        rc = abi.OPEN(self._real.xOpen)(c.addressof(self._mine), path_at, file_at, flags, out_flags)
        if rc != abi.OK or name is None:
            return int(rc)
        if new:
            self.ops.append(Op("create", name))
        file = abi.File.from_address(file_at)
        real_at = int(file.pMethods or 0)
        if real_at not in self._patched:
            self._patched[real_at] = self._patch(abi.Methods.from_address(real_at))
        file.pMethods = c.addressof(self._patched[real_at])
        self._names[file_at] = name
        return abi.OK

    def _delete(self, _vfs: int, path: bytes, flush_folder: int) -> int:
        name = self._short(path)
        if name is not None and (refused := self._refused("delete", name)):
            return refused
        rc = abi.DELETE(self._real.xDelete)(c.addressof(self._mine), path, flush_folder)
        if rc == abi.OK and name is not None:
            self.ops.append(Op("delete", name))
            self._note_folder()
        return int(rc)

    def _patch(self, real: abi.Methods) -> abi.Methods:
        """A copy of the methods that notes and fails before it asks the real ones."""
        close, real_write, real_truncate = (
            abi.CLOSE(real.xClose),
            abi.WRITE(real.xWrite),
            abi.TRUNCATE(real.xTruncate),
        )
        real_sync = abi.SYNC(real.xSync)

        def close_file(file: int) -> int:
            self._names.pop(file, None)
            return int(close(file))

        def write(file: int, data_at: int, size: int, offset: int) -> int:
            name = self._names[file]
            refused = self._refused("write", name)
            if refused:
                size //= 2  # the kernel may have taken a part of it
            self.ops.append(Op("write", name, offset, c.string_at(data_at, size)))
            return refused or int(real_write(file, data_at, size, offset))

        def truncate(file: int, size: int) -> int:
            name = self._names[file]
            if refused := self._refused("truncate", name):
                return refused
            self.ops.append(Op("truncate", name, size))
            return int(real_truncate(file, size))

        def sync(file: int, flags: int) -> int:
            name, before = self._names[file], len(self.ops)
            if refused := self._refused("sync", name):
                self.ops.append(Op("sync-failed", name, before))
                return refused
            rc = int(real_sync(file, flags))
            if rc == abi.OK:
                self.ops.append(Op("sync", name, before))
                self._note_folder()
            return rc

        def shm_map(file: int, region: int, size: int, extend: int, out: int) -> int:
            if extend and (refused := self._refused("map", self._names[file])):
                return refused
            return int(abi.MAP(real.xShmMap)(file, region, size, extend, out))

        patched = abi.Methods.from_buffer_copy(real)
        patched.xClose = self._function(abi.CLOSE, close_file)
        patched.xWrite = self._function(abi.WRITE, write)
        patched.xTruncate = self._function(abi.TRUNCATE, truncate)
        patched.xSync = self._function(abi.SYNC, sync)
        if real.xShmMap is not None:  # journals have none
            patched.xShmMap = self._function(abi.MAP, shm_map)
        return patched

"""The tables of functions through which SQLite reaches files, as ctypes sees them (sqlite3.h, version 3)."""

from __future__ import annotations

import _sqlite3
import ctypes as c
from typing import ClassVar, Final

OK: Final = 0
OPEN_CREATE: Final = 0x4


def _functions(names: str) -> list[tuple[str, type[c.c_void_p]]]:
    return [(name, c.c_void_p) for name in names.split()]


class Vfs(c.Structure):
    """``sqlite3_vfs``: opening and deleting."""

    _fields_: ClassVar = [
        ("iVersion", c.c_int),
        ("szOsFile", c.c_int),
        ("mxPathname", c.c_int),
        ("pNext", c.c_void_p),
        ("zName", c.c_char_p),
        ("pAppData", c.c_void_p),
        *_functions("xOpen xDelete xAccess xFullPathname xDlOpen xDlError xDlSym xDlClose xRandomness xSleep"),
        *_functions("xCurrentTime xGetLastError xCurrentTimeInt64 xSetSystemCall xGetSystemCall xNextSystemCall"),
    ]


class Methods(c.Structure):
    """``sqlite3_io_methods``: what can be done with an open file."""

    _fields_: ClassVar = [
        ("iVersion", c.c_int),
        *_functions("xClose xRead xWrite xTruncate xSync xFileSize xLock xUnlock xCheckReservedLock xFileControl"),
        *_functions("xSectorSize xDeviceCharacteristics xShmMap xShmLock xShmBarrier xShmUnmap xFetch xUnfetch"),
    ]


class File(c.Structure):
    """``sqlite3_file``: each open file points to its methods first."""

    _fields_: ClassVar = [("pMethods", c.c_void_p)]


POINTER: Final = c.c_void_p
OPEN = c.CFUNCTYPE(c.c_int, POINTER, POINTER, POINTER, c.c_int, POINTER)
DELETE = c.CFUNCTYPE(c.c_int, POINTER, c.c_char_p, c.c_int)
CLOSE = c.CFUNCTYPE(c.c_int, POINTER)
WRITE = c.CFUNCTYPE(c.c_int, POINTER, POINTER, c.c_int, c.c_int64)
TRUNCATE = c.CFUNCTYPE(c.c_int, POINTER, c.c_int64)
SYNC = c.CFUNCTYPE(c.c_int, POINTER, c.c_int)
MAP = c.CFUNCTYPE(c.c_int, POINTER, c.c_int, c.c_int, c.c_int, POINTER)
OPEN_FOLDER = c.CFUNCTYPE(c.c_int, c.c_char_p, POINTER)
SET_CALL = c.CFUNCTYPE(c.c_int, POINTER, c.c_char_p, POINTER)
GET_CALL = c.CFUNCTYPE(POINTER, POINTER, c.c_char_p)


def library() -> c.CDLL:
    """The SQLite that Python's own module uses: symbols are looked up in what that module is linked with."""
    found = c.CDLL(_sqlite3.__file__)
    found.sqlite3_vfs_find.restype = POINTER
    found.sqlite3_vfs_find.argtypes = [c.c_char_p]
    found.sqlite3_vfs_register.argtypes = [POINTER, c.c_int]
    found.sqlite3_vfs_unregister.argtypes = [POINTER]
    return found

"""The user's data folder: where the client remembers what servers showed it.

``TG_TINKER_DATA_DIR``, else ``XDG_DATA_HOME/tg-tinker``, else ``~/.local/share/tg-tinker``. Files are readable by
their owner alone, are replaced whole or not at all, and are written by one process at a time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_log = logging.getLogger("tg_tinker")


def data_folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Where it is; ``None`` where the user has no home. Nothing is created."""
    if given := environ.get("TG_TINKER_DATA_DIR"):
        return Path(given)
    shared = environ.get("XDG_DATA_HOME", "")
    if Path(shared).is_absolute():  # the XDG specification: a relative one is to be ignored
        return Path(shared) / "tg-tinker"
    try:
        return Path.home() / ".local" / "share" / "tg-tinker"
    except RuntimeError:
        return None


class Folder:
    """A folder that may turn out not to be writable: then it says so once, in the log, and ``write`` returns False.

    Threads and processes may share it. (On Windows two processes that write at once are not kept apart.)

    Attributes:
        path: ``None`` for none at all.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._thread = threading.RLock()
        self._warned = False

    def read(self, name: str) -> str | None:
        """The text of a file; ``None`` when it does not exist or the folder cannot be entered.

        Raises:
            OSError: it exists and cannot be read.
            UnicodeDecodeError: it is not text.
        """
        if self.path is None:
            return None
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except PermissionError as e:
            if os.access((self.path / name).parent, os.X_OK):
                raise
            self._warn(e)
            return None

    def files(self, below: str, pattern: str) -> list[Path]:
        """The files of a folder below that match, sorted."""
        return [] if self.path is None else sorted((self.path / below).glob(pattern))

    def write(self, name: str, text: str) -> bool:
        """Replace a file by this text or leave it as it is; whether it was written.

        After a power cut the file holds this text or the one before, whole: the name is not flushed, which would
        take longer than everything else here (4 of 7 ms on the machine this was measured on).
        """
        if self.path is None:
            self._warn(OSError("there is no home folder"))
            return False
        target = self.path / name
        try:
            self._make(target.parent)
            _replace(target, text.encode())
        except OSError as e:
            self._warn(e)
            return False
        return True

    def rename(self, name: str, new: str) -> bool:
        """Give a file another name, whatever had that before; whether nothing of the old name is left."""
        if self.path is None:
            return True
        try:
            (self.path / name).replace(self.path / new)
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError as e:
            self._warn(e)
            return False
        return True

    def append(self, name: str, line: str) -> bool:
        """Add a line to a file in one write; whether it was written. Not flushed to the disk."""
        if self.path is None:
            self._warn(OSError("there is no home folder"))
            return False
        target = self.path / name
        try:
            self._make(target.parent)
            with open(target, "ab+", buffering=0, opener=_private) as file:
                end = file.seek(0, os.SEEK_END)
                torn = False
                if end:
                    file.seek(end - 1)
                    torn = file.read(1) != b"\n"  # a full disk or a crash cut the line before: do not join it
                data = (b"\n" if torn else b"") + line.encode() + b"\n"
                if file.write(data) != len(data):
                    raise OSError("the line was cut off; the disk may be full")
        except OSError as e:
            self._warn(e)
            return False
        return True

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else, thread or process, is in a block of this at the same time."""
        with self._thread, contextlib.ExitStack() as stack:
            if self.path is not None and sys.platform != "win32":
                try:
                    self._make(self.path)
                    file = stack.enter_context(open(self.path / ".lock", "ab", opener=_private))
                    fcntl.flock(file, fcntl.LOCK_EX)
                except OSError as e:
                    self._warn(e)
            yield

    def _make(self, path: Path) -> None:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _warn(self, reason: OSError) -> None:
        if not self._warned:
            self._warned = True
            _log.warning(
                "%s cannot be written (%s): what servers show is remembered only until this process ends, so that a "
                "server put back to an older state is not noticed afterwards. Set TG_TINKER_DATA_DIR to a folder "
                "of yours",
                self.path or "the data folder",
                reason,
            )


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _replace(target: Path, data: bytes) -> None:
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=".new-")  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave an empty file under the new name
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise

"""Between iterators of bytes and objects with ``read`` and ``write``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import IO

from tg_tinker.exports.tar import Bytes

CHUNK_BYTES = 2**20


class PieceReader:
    """Pieces as a file to read from, once; the error of a source that fails is kept in ``error`` too.

    The reader on the other side (pyrage, in Rust) turns Python's errors into its own.
    """

    def __init__(self, source: Iterable[Bytes]) -> None:
        self._source = iter(source)
        self._held = memoryview(b"")
        self.error: BaseException | None = None

    def read(self, size: int = -1) -> bytes:
        """At most ``size`` bytes; nothing at the end."""
        if size < 0:
            raise ValueError("read needs a size")
        while not self._held:
            try:
                piece = next(self._source, None)
            except BaseException as e:
                self.error = e
                raise
            if piece is None:
                return b""
            self._held = memoryview(bytes(piece))
        taken, self._held = self._held[:size], self._held[size:]
        return bytes(taken)


def read_file(file: IO[bytes]) -> Iterator[bytes]:
    """A file in pieces of at most 1 MiB."""
    while piece := file.read(CHUNK_BYTES):
        yield piece

"""The archive of an export: a POSIX tar with one spelling, so that a changed bit is a refused archive.

Any ``tar`` unpacks it into one folder, named after the artifact. Members are few, known by name and in a fixed order;
owner, times and modes are constants. The reader takes exactly what the writer writes: no links, no folders, no paths.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator

from tg_tinker.exports.errors import refused

BLOCK_BYTES = 512
END = bytes(2 * BLOCK_BYTES)
FOLDER = re.compile(r"[a-z]{1,15}_[0-9a-f]{8,64}", re.ASCII)
LARGEST_MEMBER_BYTES = 8 * 2**30 - 1  # what the size field of a tar header holds

MANIFEST = "manifest.dsse.json"
BUNDLE = "model.sig"
BUNDLE_KEY = "model.pub"
ADAPTER = "adapter_model.safetensors"
WEIGHTS = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
CARD = "README.md"
REPORT = "report.json"
REPORT_PAGE = "report.html"

# In this order: what tells whether to trust the rest comes first, weights come last.
LARGEST_BYTES = {
    MANIFEST: 2**20,
    ADAPTER_CONFIG: 2**20,
    CARD: 2**20,
    REPORT: 64 * 2**20,
    REPORT_PAGE: 64 * 2**20,
    BUNDLE_KEY: 2**12,
    BUNDLE: 2**20,
    ADAPTER: LARGEST_MEMBER_BYTES,
    WEIGHTS: LARGEST_MEMBER_BYTES,
}
ORDER = {name: i for i, name in enumerate(LARGEST_BYTES)}
WEIGHT_FILES = (ADAPTER, WEIGHTS)

Bytes = bytes | bytearray | memoryview


def member_header(folder: str, name: str, size: int) -> bytes:
    """The 512 bytes before a member.

    Raises:
        ValueError: a name or size no export has.
    """
    if FOLDER.fullmatch(folder) is None or not 0 <= size <= LARGEST_BYTES.get(name, -1):
        raise ValueError(f"no export has a file {name!r} of {size} bytes in {folder!r}")
    info = tarfile.TarInfo(f"{folder}/{name}")
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.USTAR_FORMAT)


def padding(size: int) -> bytes:
    """Zeros up to the next block."""
    return bytes(-size % BLOCK_BYTES)


def write_tar(folder: str, members: Iterable[tuple[str, int, Iterable[Bytes]]]) -> Iterator[Bytes]:
    """The archive in pieces; a piece is used up before the next is asked for.

    Args:
        members: name, size and content, in the order of `ORDER`.

    Raises:
        ValueError: content that is not of the size announced, or names out of order.
    """
    last = -1
    for name, size, content in members:
        yield member_header(folder, name, size)
        if ORDER[name] <= last:
            raise ValueError(f"{name} is out of order")
        last, written = ORDER[name], 0
        for piece in content:
            written += len(piece)
            yield piece
        if written != size:
            raise ValueError(f"{name} has {written} bytes, not {size}")
        yield padding(size)
    yield END


class TarReader:
    """Members of an archive, one after the other, from a stream cut anywhere.

    Raises:
        InvalidRequestError: anything but an archive that `write_tar` writes. Every method can raise it.
    """

    def __init__(self, source: Iterable[Bytes]) -> None:
        self._source = iter(source)
        self._held = bytearray()
        self._last = -1
        self._left = 0
        self._size = 0
        self.folder = ""

    def next_member(self) -> tuple[str, int] | None:
        """Name and size of the next member, whose content `content` then gives; ``None`` after the last."""
        if self._left:
            raise ValueError("the member before was not read")
        header = self._take(BLOCK_BYTES)
        if header == END[:BLOCK_BYTES]:
            if self._take(BLOCK_BYTES) != END[:BLOCK_BYTES] or self._more():
                raise refused("the archive does not end where it should")
            return None
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as e:
            raise refused("it is not a tar archive") from e
        folder, _, name = info.name.partition("/")
        try:
            expected = member_header(folder, name, info.size)
        except ValueError as e:
            raise refused("its archive holds a file that no export has") from e
        if expected != header:
            raise refused(f"the archive's entry for {name} is not as a TG-Tinker server writes it")
        if self.folder not in {"", folder} or ORDER[name] <= self._last:
            raise refused(f"its archive holds {name} twice or in the wrong place")
        self.folder, self._last = folder, ORDER[name]
        self._left = self._size = info.size
        return name, info.size

    def content(self) -> Iterator[bytes]:
        """The member just found, in pieces; read it to its end."""
        while self._left:
            if not self._held and not self._more():
                raise refused("it is cut off")
            piece = bytes(self._held[: self._left])
            del self._held[: len(piece)]
            self._left -= len(piece)
            yield piece
        if any(self._take(-self._size % BLOCK_BYTES)):
            raise refused("its archive holds something between files")

    def _more(self) -> bool:
        while not self._held:
            piece = next(self._source, None)
            if piece is None:
                return False
            self._held += piece
        return True

    def _take(self, count: int) -> bytes:
        while len(self._held) < count:
            piece = next(self._source, None)
            if piece is None:
                raise refused("it is cut off")
            self._held += piece
        taken = bytes(self._held[:count])
        del self._held[:count]
        return taken

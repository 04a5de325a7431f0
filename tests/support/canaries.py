"""Random marker strings, and a search for them in bytes of any kind.

A marker is found as text in UTF-8, UTF-16 and UTF-32, as token ids in 16, 32 and 64 bits of either byte order, as a
printed list of ids, in hexadecimal and in base64. Half a marker is enough.
"""

from __future__ import annotations

import base64
import random
import string
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

LENGTH = 28
_WINDOW = 8  # bytes compared at once
BLOCK = 1 << 18
Bytes = npt.NDArray[np.uint8]


def markers(count: int, seed: int) -> list[str]:
    """Letters and digits only, which no escaping changes."""
    choice = random.Random(seed)
    return ["".join(choice.choices(string.ascii_letters + string.digits, k=LENGTH)) for _ in range(count)]


def encodings(marker: str) -> Iterator[tuple[str, bytes]]:
    """Forms of a marker that are not its bytes at a regular distance."""
    raw = marker.encode()
    yield "hexadecimal", raw.hex().encode()
    yield "HEXADECIMAL", raw.hex().upper().encode()
    for skip in range(3):  # where it may begin in a group of three bytes
        whole = raw[(3 - skip) % 3 :]
        whole = whole[: len(whole) // 3 * 3]
        yield "base64", base64.b64encode(whole)
    for separator in (", ", ",", " ", "\n"):
        yield "a list of ids", separator.join(map(str, raw)).encode()


class Searcher:
    """Looks for a set of markers, all at once."""

    def __init__(self, wanted: Sequence[str]) -> None:
        # Halves of a marker are so rare that eight of their bytes say enough.
        self._halves = {half: marker for marker in wanted for half in _halves(marker)}
        self._half_keys = _Keys(self._halves)
        self._forms: dict[bytes, list[tuple[str, str, bytes]]] = {}
        for marker in wanted:
            for name, form in encodings(marker):
                self._forms.setdefault(form[:_WINDOW], []).append((name, marker, form))
        self._form_keys = _Keys(self._forms)

    def search(self, data: bytes) -> set[tuple[str, str]]:
        """(how it is written, marker) for each that is in there."""
        found: set[tuple[str, str]] = set()
        plain = np.frombuffer(data, np.uint8)
        for width in (1, 2, 4, 8):
            for offset in range(width):
                narrow = np.ascontiguousarray(plain[offset::width])
                for at in self._half_keys.hits(narrow):
                    half = narrow[at : at + _WINDOW].tobytes()
                    found.add((f"every {width} bytes" if width > 1 else "bytes", self._halves[half]))
        for at in self._form_keys.hits(plain):
            for name, marker, form in self._forms[data[at : at + _WINDOW]]:
                if data.startswith(form, at):
                    found.add((name, marker))
        return found


def _halves(marker: str) -> tuple[bytes, bytes]:
    raw = marker.encode()
    return raw[:_WINDOW], raw[-_WINDOW:]


class _Keys:
    """A set of windows of eight bytes, and a table that says "no" to almost everything else at once."""

    def __init__(self, windows: Iterable[bytes]) -> None:
        self._sorted = np.unique(np.frombuffer(b"".join(windows), np.uint64))
        self._maybe = np.zeros(1 << 20, np.bool_)
        self._maybe[_scatter(self._sorted)] = True

    def hits(self, data: Bytes) -> Iterator[int]:
        """Where a window of ``data`` is one of them."""
        for start in range(0, len(data) - _WINDOW + 1, BLOCK):
            block = data[start : start + BLOCK + _WINDOW - 1]
            windows = np.lib.stride_tricks.sliding_window_view(block, _WINDOW)
            values = np.ascontiguousarray(windows).view(np.uint64)[:, 0]
            places = np.flatnonzero(self._maybe[_scatter(values)])
            nearest = np.minimum(np.searchsorted(self._sorted, values[places]), len(self._sorted) - 1)
            yield from (start + int(i) for i in places[self._sorted[nearest] == values[places]])


def _scatter(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Twenty bits of each, by a multiplication that mixes (Knuth)."""
    scattered: npt.NDArray[np.uint64] = (values * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(44)
    return scattered

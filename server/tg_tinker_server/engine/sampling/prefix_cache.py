"""What models kept of prompts that were read, so that a prompt that begins alike need not be read again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tg_tinker_server.engine.sampling.rows import Memory
from tg_tinker_server.engine.sampling.seam import SampledWeights

Tokens = Sequence[int] | npt.NDArray[np.int64]
MOST_ENTRIES = 1024


class PrefixCache:
    """Memories by weights and tokens, least recently used first out.

    Entries belong to one handle of weights, which belongs to one tenant: nobody learns from the speed of an answer
    what another tenant has sent.

    Args:
        most_bytes: bound on what all memories take; one that is larger is not kept.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._entries: OrderedDict[int, tuple[SampledWeights, npt.NDArray[np.int64], Memory]] = OrderedDict()
        self._of: dict[int, list[int]] = {}  # entries of each handle
        self._count = 0
        self.size_bytes = 0

    def find(self, weights: SampledWeights, tokens: Tokens) -> Memory | None:
        """Memory of the longest known beginning of these tokens."""
        wanted = np.asarray(tokens, dtype=np.int64)
        best, length = None, 0
        for number in self._of.get(id(weights), ()):
            shared = common_prefix(wanted, self._entries[number][1])
            if shared > length:
                best, length = number, shared
        if best is None:
            return None
        self._entries.move_to_end(best)
        return self._entries[best][2].cut(length)

    def put(self, weights: SampledWeights, tokens: Tokens, memory: Memory) -> None:
        """Keep the memory of these tokens, in the place of what it continues."""
        known = np.asarray(tokens, dtype=np.int64)
        if memory.size_bytes > self._most_bytes:
            return
        for number in list(self._of.get(id(weights), ())):
            other = self._entries[number][1]
            shared = common_prefix(known, other)
            if shared == known.size:
                self._entries.move_to_end(number)
                return
            if shared == other.size:
                self._drop(number)
        self._count += 1
        self._entries[self._count] = (weights, known, memory)
        self._of.setdefault(id(weights), []).append(self._count)
        self.size_bytes += memory.size_bytes
        while self.size_bytes > self._most_bytes or len(self._entries) > MOST_ENTRIES:
            self._drop(next(iter(self._entries)))

    def forget(self, weights: SampledWeights) -> None:
        """Drop all memories of weights that are gone."""
        for number in list(self._of.get(id(weights), ())):
            self._drop(number)

    def _drop(self, number: int) -> None:
        weights, _, memory = self._entries.pop(number)
        self.size_bytes -= memory.size_bytes
        mine = self._of[id(weights)]
        mine.remove(number)
        if not mine:
            del self._of[id(weights)]


def common_prefix(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> int:
    """How many first tokens are equal.

    >>> common_prefix(np.array([1, 2, 3]), np.array([1, 2, 4, 5]))
    2
    """
    size = min(a.size, b.size)
    different = np.flatnonzero(a[:size] != b[:size])
    return int(different[0]) if different.size else size

"""What the sampler asks of a model: read pieces of prompts, and move a batch of sequences on by one token.

Shape suffixes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt

from tg_tinker_server.engine.sampling.seam import SampledWeights


class Memory(Protocol):
    """What a model keeps of the beginning of one sequence. It never changes."""

    @property
    def length(self) -> int:
        """Tokens that were read."""
        ...

    @property
    def size_bytes(self) -> int:
        """Memory that it takes."""
        ...

    def cut(self, length: int) -> Memory:
        """What was kept of the first ``length`` tokens."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reading:
    """A piece of a prompt to read.

    Attributes:
        weights: with which.
        memory: of what comes before it; ``None``: nothing does.
        tokens: at least one. Where several are read at once, a row with memory has as many as any other.
        logits: of how many of its last positions they are wanted; at least 1.
    """

    weights: SampledWeights
    memory: Memory | None
    tokens: Sequence[int]
    logits: int


class RunningRows(Protocol):
    """Sequences that go through the model together."""

    def arrange(self, rows: Sequence[int | tuple[SampledWeights, Memory]]) -> None:
        """Become these rows in this order: an index means a row of now, a pair one that joins. Rows of equal weights
        lie next to each other.
        """
        ...

    def advance(self, tokens: Sequence[int]) -> npt.NDArray[Any]:
        """Read one token for each row; logits of what follows, float [B, V]."""
        ...

    def take(self, row: int) -> Memory:
        """A copy of what is kept of one row."""
        ...


class ModelRows(Protocol):
    """The models of one backend."""

    def key(self, weights: SampledWeights) -> Hashable | None:
        """Weights of equal keys can be in one batch; ``None``: each sequence goes alone, and no memory is reused."""
        ...

    def read(self, readings: Sequence[Reading]) -> list[tuple[Memory, npt.NDArray[Any]]]:
        """Read pieces of prompts with weights of one key: memory up to their ends, and logits [n, V] of the last
        positions.
        """
        ...

    def rows(self, weights: SampledWeights) -> RunningRows:
        """An empty batch for weights of this key."""
        ...

"""Sampling from the bigram: all that it keeps of a text is how long it is.

Shape suffixes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from tg_tinker_server.engine.sampling.rows import Memory, Reading
from tg_tinker_server.engine.sampling.seam import SampledWeights
from tg_tinker_server.engine.tokenizers import ByteTokenizer


class BigramWeights:
    """A base table, and what was trained on top. See ``seam.SampledWeights``."""

    def __init__(
        self, base_VV: npt.NDArray[np.float64], weights_VV: npt.NDArray[np.float32] | None, *, max_positions: int
    ) -> None:
        self._base_VV, self._weights_VV = base_VV, weights_VV
        self._tokenizer = ByteTokenizer()
        self.vocab_size = len(base_VV)
        self.max_positions = max_positions
        self.eos_token_ids = self._tokenizer.eos_token_ids
        self.start_token_id = self._tokenizer.start_token_id
        self.version = 0
        self.size_bytes = 0 if weights_VV is None else weights_VV.nbytes
        self.closed = False
        self._told: list[Callable[[BigramWeights], None]] = []

    def when_closed(self, tell: Callable[[BigramWeights], None]) -> None:
        """See ``seam.SampledWeights``."""
        if tell not in self._told:
            self._told.append(tell)

    def put(self, weights_VV: npt.NDArray[np.float32]) -> None:
        """Take what was trained now in the place of what was."""
        self._weights_VV = weights_VV
        self.version += 1

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[Any]:
        """Logits after each token [B, V]."""
        index = np.asarray(tokens, dtype=np.int64)
        logits: npt.NDArray[Any] = self._base_VV[index]
        return logits if self._weights_VV is None else logits + self._weights_VV[index]

    def encode(self, text: str) -> list[int]:
        """See ``seam.SampledWeights``."""
        return self._tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """See ``seam.SampledWeights``."""
        return self._tokenizer.decode(ids)

    def close(self) -> None:
        """See ``seam.SampledWeights``."""
        self._weights_VV = None
        self.closed = True
        for tell in self._told:
            tell(self)
        self._told.clear()


@dataclass(frozen=True, slots=True)
class _Length:
    """See ``rows.Memory``."""

    length: int
    size_bytes: int = 8

    def cut(self, length: int) -> _Length:
        """See ``rows.Memory``."""
        return _Length(length)


class BigramRows:
    """See ``rows.ModelRows``."""

    def key(self, weights: SampledWeights) -> Hashable | None:  # noqa: ARG002 - part of the seam
        """See ``rows.ModelRows``. There is one model."""
        return "bigram"

    def read(self, readings: Sequence[Reading]) -> list[tuple[Memory, npt.NDArray[Any]]]:
        """See ``rows.ModelRows``."""
        return [
            (
                _Length((r.memory.length if r.memory else 0) + len(r.tokens)),
                cast(BigramWeights, r.weights).logits(r.tokens[-r.logits :]),
            )
            for r in readings
        ]

    def rows(self, weights: SampledWeights) -> _Running:  # noqa: ARG002 - part of the seam
        """See ``rows.ModelRows``."""
        return _Running()


class _Running:
    """See ``rows.RunningRows``."""

    def __init__(self) -> None:
        self._rows: list[tuple[SampledWeights, int]] = []

    def arrange(self, rows: Sequence[int | tuple[SampledWeights, Memory]]) -> None:
        """See ``rows.RunningRows``."""
        self._rows = [self._rows[row] if isinstance(row, int) else (row[0], row[1].length) for row in rows]

    def advance(self, tokens: Sequence[int]) -> npt.NDArray[Any]:
        """See ``rows.RunningRows``."""
        self._rows = [(weights, length + 1) for weights, length in self._rows]
        return np.concatenate(
            [cast(BigramWeights, w).logits([token]) for (w, _), token in zip(self._rows, tokens, strict=True)]
        )

    def take(self, row: int) -> Memory:
        """See ``rows.RunningRows``."""
        return _Length(self._rows[row][1])

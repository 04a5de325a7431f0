"""Sampling from the bigram: all that it keeps of a text is how long it is.

Shape suffixes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from tg_tinker_server.engine.sampling.rows import Memory, Reading
from tg_tinker_server.engine.sampling.seam import FrozenWeights
from tg_tinker_server.engine.tokenizers import ByteTokenizer


class BigramWeights:
    """A base table, and what was trained on top. See ``seam.FrozenWeights``."""

    def __init__(
        self, base_VV: npt.NDArray[np.float64], weights_VV: npt.NDArray[np.float32] | None, *, max_positions: int
    ) -> None:
        self._base_VV, self._weights_VV = base_VV, weights_VV
        self._tokenizer = ByteTokenizer()
        self.vocab_size = len(base_VV)
        self.max_positions = max_positions
        self.eos_token_ids = self._tokenizer.eos_token_ids
        self.size_bytes = 0 if weights_VV is None else weights_VV.nbytes
        self.closed = False

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[Any]:
        """Logits after each token [B, V]."""
        index = np.asarray(tokens, dtype=np.int64)
        logits: npt.NDArray[Any] = self._base_VV[index]
        return logits if self._weights_VV is None else logits + self._weights_VV[index]

    def encode(self, text: str) -> list[int]:
        """See ``seam.FrozenWeights``."""
        return self._tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """See ``seam.FrozenWeights``."""
        return self._tokenizer.decode(ids)

    def close(self) -> None:
        """See ``seam.FrozenWeights``."""
        self._weights_VV = None
        self.closed = True


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

    def key(self, weights: FrozenWeights) -> Hashable | None:  # noqa: ARG002 - part of the seam
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

    def rows(self, weights: FrozenWeights) -> _Running:  # noqa: ARG002 - part of the seam
        """See ``rows.ModelRows``."""
        return _Running()


class _Running:
    """See ``rows.RunningRows``."""

    def __init__(self) -> None:
        self._rows: list[tuple[FrozenWeights, int]] = []

    def arrange(self, rows: Sequence[int | tuple[FrozenWeights, Memory]]) -> None:
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

"""What tokens cost that a sequence has seen already: repetition, presence and frequency penalties.

Shape suffixes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tg_tinker.types.sampling import GenerationOptions

_MOST = 1e300
"""Logits stay within this, so that the largest penalties leave numbers that can be subtracted."""


class Penalties:
    """The tokens of one sequence, and what each costs from now on. See ``GenerationOptions``.

    >>> penalties = Penalties(GenerationOptions(repetition_penalty=2.0), prompt=[0, 1], vocab_size=3)
    >>> penalties.applied(np.array([2.0, -1.0, 3.0])).tolist()
    [1.0, -2.0, 3.0]
    """

    def __init__(self, options: GenerationOptions, *, prompt: Sequence[int], vocab_size: int) -> None:
        self._options = options
        self._seen_V = np.zeros(vocab_size, dtype=bool)
        self._seen_V[np.asarray(prompt, dtype=np.int64)] = True
        self._generated: dict[int, int] = {}

    def note(self, token: int) -> None:
        """A token was generated."""
        self._seen_V[token] = True
        self._generated[token] = self._generated.get(token, 0) + 1

    def applied(self, logits_V: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Logits after the penalties, in double precision; finite if they were."""
        options, logits = self._options, logits_V.astype(np.float64)
        rate = options.repetition_penalty
        if rate != 1:
            logits = np.where(self._seen_V, np.where(logits > 0, logits / rate, logits * rate), logits)
        if self._generated and (options.presence_penalty or options.frequency_penalty):
            ids = np.fromiter(self._generated, dtype=np.int64, count=len(self._generated))
            counts = np.fromiter(self._generated.values(), dtype=np.float64, count=ids.size)
            with np.errstate(over="ignore", invalid="ignore"):
                costs = np.clip(options.frequency_penalty * counts, -_MOST, _MOST)
                logits[ids] -= np.clip(options.presence_penalty, -_MOST, _MOST) + costs
        return np.clip(logits, -_MOST, _MOST)


def penalties_of(options: GenerationOptions, *, prompt: Sequence[int], vocab_size: int) -> Penalties | None:
    """Penalties for one sequence; ``None`` where the options ask for none."""
    if (options.repetition_penalty, options.presence_penalty, options.frequency_penalty) == (1, 0, 0):
        return None
    return Penalties(options, prompt=prompt, vocab_size=vocab_size)

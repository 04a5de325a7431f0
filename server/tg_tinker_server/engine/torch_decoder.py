"""Generates with a transformers model: one group of sequences in a batch of the token sampler's making.

Shape suffixes: B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tg_tinker_server.engine.lora import AdaptedBase
from tg_tinker_server.engine.sampling.rows import Reading
from tg_tinker_server.engine.sampling.torch_rows import TorchRows
from tg_tinker_server.engine.sampling.torch_weights import TorchWeights


class TorchDecoder:
    """What a session's model keeps of one group of sequences. See ``generation.Decoder``.

    Args:
        base: the model, with the session's adapter on it.
        adapter: its name; ``None``: the base is the session's alone.
        ensure_open: called before each run through the model; other sessions use it in between.
    """

    def __init__(self, base: AdaptedBase, adapter: str | None, ensure_open: Callable[[], None]) -> None:
        self._weights = TorchWeights(base, adapter, size_bytes=0, on_close=lambda: None)
        self._ensure_open = ensure_open
        self._model = TorchRows()
        self._rows = self._model.rows(self._weights)
        self._count = 0

    def start(self, prompts: Sequence[Sequence[int]]) -> npt.NDArray[Any]:
        """Read the prompts; logits of each one's next token [B, V]."""
        self._ensure_open()
        readings = [Reading(weights=self._weights, memory=None, tokens=prompt, logits=1) for prompt in prompts]
        results = self._model.read(readings)
        self._rows.arrange([(self._weights, memory) for memory, _ in results])
        self._count = len(prompts)
        return np.stack([logits[-1] for _, logits in results])

    def advance(self, tokens: Sequence[int], keep: Sequence[int]) -> npt.NDArray[Any]:
        """Drop the rows not kept, append one token to each of the others."""
        self._ensure_open()
        if len(keep) != self._count:
            self._rows.arrange(list(keep))
            self._count = len(keep)
        return self._rows.advance(tokens)

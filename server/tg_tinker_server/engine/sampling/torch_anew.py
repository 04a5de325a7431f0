"""Sampling from models whose sequences cannot be put together: each computed from its beginning, alone.

Shape suffixes: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from tg_tinker_server.engine.sampling.rows import Memory, Reading
from tg_tinker_server.engine.sampling.seam import SampledWeights
from tg_tinker_server.engine.sampling.torch_weights import TorchWeights, computing


@dataclass(frozen=True, slots=True, eq=False)
class _Tokens:
    """See ``rows.Memory``: nothing but the tokens, for a model whose sequences are computed anew each time."""

    tokens: tuple[int, ...]

    @property
    def length(self) -> int:
        """See ``rows.Memory``."""
        return len(self.tokens)

    @property
    def size_bytes(self) -> int:
        """See ``rows.Memory``."""
        return 8 * len(self.tokens)

    def cut(self, length: int) -> _Tokens:
        """See ``rows.Memory``."""
        return _Tokens(self.tokens[:length])


class Anew:
    """See ``rows.RunningRows``: one sequence of a model whose cache cannot be taken apart."""

    def __init__(self) -> None:
        self._rows: list[tuple[TorchWeights, tuple[int, ...]]] = []

    def arrange(self, rows: Sequence[int | tuple[SampledWeights, Memory]]) -> None:
        """See ``rows.RunningRows``."""
        self._rows = [
            self._rows[r] if isinstance(r, int) else (cast(TorchWeights, r[0]), cast(_Tokens, r[1]).tokens)
            for r in rows
        ]

    def advance(self, tokens: Sequence[int]) -> npt.NDArray[Any]:
        """See ``rows.RunningRows``."""
        self._rows = [(weights, (*text, new)) for (weights, text), new in zip(self._rows, tokens, strict=True)]
        return np.stack([_logits_anew(weights, text)[-1] for weights, text in self._rows])

    def take(self, row: int) -> Memory:
        """See ``rows.RunningRows``."""
        return _Tokens(self._rows[row][1])


def read_anew(reading: Reading) -> tuple[Memory, npt.NDArray[Any]]:
    """See ``rows.ModelRows.read``."""
    before = cast(_Tokens, reading.memory).tokens if reading.memory is not None else ()
    text = (*before, *reading.tokens)
    return _Tokens(text), _logits_anew(cast(TorchWeights, reading.weights), text)[-reading.logits :]


def _logits_anew(weights: TorchWeights, tokens: Sequence[int]) -> npt.NDArray[Any]:
    device = next(weights.base.module.parameters()).device
    with computing([weights]):
        logits_TV = weights.base.language_model.logits(torch.tensor([list(tokens)], device=device))[0]
        logits: npt.NDArray[Any] = logits_TV.float().cpu().numpy()
    return logits

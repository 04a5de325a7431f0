"""Choosing the next token: penalties, temperature, top-k, top-p, in this order. Pure NumPy.

Shape suffixes: B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tg_tinker.errors import InvalidRequestError
from tg_tinker_server.engine.backend import GenerationOptions

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class TokenCounts:
    """Which tokens each sequence has seen, kept only where a penalty asks for it."""

    def __init__(self, prompts: Sequence[Sequence[int]], vocab_size: int, params: GenerationOptions) -> None:
        self.wanted = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1, 0, 0)
        rows = len(prompts) if self.wanted else 0
        self.seen_BV = np.zeros((rows, vocab_size), dtype=bool)
        self.generated_BV = np.zeros((rows, vocab_size), dtype=np.int64)
        for row in range(rows):
            self.seen_BV[row, np.asarray(prompts[row], dtype=np.int64)] = True

    def add(self, row: int, token: int) -> None:
        """Note a generated token."""
        if self.wanted:
            self.seen_BV[row, token] = True
            self.generated_BV[row, token] += 1


def penalised(
    logits_BV: Floats, seen_BV: npt.NDArray[np.bool_], generated_BV: Ints, params: GenerationOptions
) -> Floats:
    """Apply the three penalties.

    >>> both = np.ones((1, 2), dtype=bool)
    >>> params = GenerationOptions(repetition_penalty=2.0)
    >>> penalised(np.array([[2.0, -1.0]]), both, np.zeros((1, 2), dtype=np.int64), params)
    array([[ 1., -2.]])
    """
    r = params.repetition_penalty
    scaled = np.where(logits_BV > 0, logits_BV / r, logits_BV * r)
    out = np.where(seen_BV, scaled, logits_BV)
    out -= params.presence_penalty * (generated_BV > 0)
    out -= params.frequency_penalty * generated_BV
    return out


def keep_top_k(logits_BV: Floats, k: int) -> Floats:
    """Keep the k largest logits of each row, the first of equals; -inf elsewhere."""
    if k >= logits_BV.shape[1]:
        return logits_BV
    order_BV = np.argsort(-logits_BV, axis=1, kind="stable")[:, :k]
    out = np.full_like(logits_BV, -np.inf)
    np.put_along_axis(out, order_BV, np.take_along_axis(logits_BV, order_BV, axis=1), axis=1)
    return out


def keep_top_p(logits_BV: Floats, p: float) -> Floats:
    """Keep the smallest set of most likely tokens with probability at least p; -inf elsewhere."""
    order_BV = np.argsort(-logits_BV, axis=1, kind="stable")
    sorted_BV = softmax(np.take_along_axis(logits_BV, order_BV, axis=1))
    before_BV = np.cumsum(sorted_BV, axis=1) - sorted_BV
    keep_BV = np.empty_like(before_BV, dtype=bool)
    np.put_along_axis(keep_BV, order_BV, before_BV < p, axis=1)
    return np.where(keep_BV, logits_BV, -np.inf)


def softmax(logits_BV: Floats) -> Floats:
    """Probabilities of each row, stable for any finite maximum."""
    exp_BV = np.exp(logits_BV - logits_BV.max(axis=1, keepdims=True))
    return np.asarray(exp_BV / exp_BV.sum(axis=1, keepdims=True))


def choose(
    logits_BV: npt.NDArray[np.floating[npt.NBitBase]],
    counts: TokenCounts,
    rows: Sequence[int],
    params: GenerationOptions,
    rngs: Sequence[np.random.Generator],
) -> Ints:
    """Choose one token for each row of logits.

    Args:
        logits_BV: of the sequences still running.
        counts: of all sequences.
        rows: which of them these logits belong to.
        params: how to choose.
        rngs: one stream per row of logits; one number is drawn from each unless greedy.

    Raises:
        InvalidRequestError: logits that are NaN or infinite; the weights have diverged.
    """
    logits = np.asarray(logits_BV, dtype=np.float64)
    if not np.isfinite(logits).all():
        raise InvalidRequestError(
            "the model's logits are not finite, so its weights have diverged; load an earlier checkpoint and "
            "lower the learning rate",
            field="weights",
            constraint="finite",
        )
    if counts.wanted:
        index = np.asarray(rows, dtype=np.int64)
        logits = penalised(logits, counts.seen_BV[index], counts.generated_BV[index], params)
    if params.temperature == 0:
        return np.asarray(np.argmax(logits, axis=1), dtype=np.int64)
    logits = logits - logits.max(axis=1, keepdims=True)  # before dividing: a tiny temperature must not overflow
    with np.errstate(over="ignore"):
        logits = logits / params.temperature
    if params.top_k:
        logits = keep_top_k(logits, params.top_k)
    if params.top_p < 1:
        logits = keep_top_p(logits, params.top_p)
    cumulative_BV = np.cumsum(softmax(logits), axis=1)
    chosen = np.empty(len(logits), dtype=np.int64)
    for i, rng in enumerate(rngs):
        total = cumulative_BV[i, -1]
        # Strictly below the total, so that a token of probability zero at the end is never reached.
        point = min(rng.random() * total, np.nextafter(total, 0))
        chosen[i] = np.searchsorted(cumulative_BV[i], point, side="right")
    return chosen

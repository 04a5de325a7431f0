"""One sequence's choices: penalties, temperature, top_k, top_p, in this order, and their log-probabilities.

Each sequence has a generator of its own and is computed by itself, so what it chooses does not depend on who else is
in the batch, but for the rounding of the logits. Shape suffixes: V vocabulary, K alternatives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types.tokens import MISSING_LOGPROB, SamplingParams
from tg_tinker_server.engine.sampling.penalties import Penalties

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
_SEED_BITS = 2**64 - 1


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """One token: its log-probability when penalised and tempered, before anything is cut off, and alternatives."""

    token: int
    logprob: float
    topk: tuple[npt.NDArray[np.int32], Floats] | None


class Chooser:
    """Chooses the tokens of one sequence.

    Args:
        params: how.
        stream: numbers that name this sequence's random stream: a seed and its index.
        topk: how many alternatives to tell.
        penalties: what this sequence's own tokens cost, if anything.
    """

    def __init__(
        self, params: SamplingParams, stream: tuple[int, int], *, topk: int, penalties: Penalties | None = None
    ) -> None:
        self._params, self._topk, self._penalties = params, topk, penalties
        self._rng = generator_of(*stream)

    def choose(self, logits_V: npt.NDArray[Any]) -> Choice:
        """The next token. One number is drawn unless greedy.

        Raises:
            InvalidRequestError: the logits are not finite.
        """
        params = self._params
        logits_V = finite(logits_V)
        if self._penalties is not None:
            logits_V = self._penalties.applied(logits_V)
        logprobs_V = log_softmax(logits_V, params.temperature or 1.0)
        token = int(np.argmax(logits_V)) if params.temperature == 0 else self._draw(logprobs_V)
        if self._penalties is not None:
            self._penalties.note(token)
        topk = top_k(logprobs_V, self._topk) if self._topk else None
        return Choice(token, float(logprobs_V[token]), topk)

    def _draw(self, logprobs_V: Floats) -> int:
        ids = self.kept(logprobs_V)
        weights = np.exp(logprobs_V if ids is None else logprobs_V[ids])
        at = draw(weights, self._rng.random())
        return at if ids is None else int(ids[at])

    def kept(self, logprobs_V: Floats) -> Ints | None:
        """Ids that top_k and top_p leave, ascending; ``None``: all."""
        params, size = self._params, logprobs_V.size
        ids: Ints | None = None
        if 0 < params.top_k < size:
            ids = _largest(logprobs_V, params.top_k)
        if params.top_p < 1:
            ids = _nucleus(logprobs_V, ids, params.top_p)
        return None if ids is None else np.sort(ids)


def generator_of(seed: int, index: int) -> np.random.Generator:
    """The random stream of one sequence of a request."""
    return np.random.default_rng([seed & _SEED_BITS, index])


def draw(weights: Floats, point: float) -> int:
    """The index whose share of the summed weights holds ``point``, 0 to 1; never one of weight zero."""
    cumulative = np.cumsum(weights, dtype=np.float64)
    total = cumulative[-1]
    # Strictly below the total, so that a weight of zero at the end is never reached.
    return int(np.searchsorted(cumulative, min(point * total, np.nextafter(total, 0)), side="right"))


def finite(logits: npt.NDArray[Any]) -> Floats:
    """The logits as float32.

    Raises:
        InvalidRequestError: one of them is NaN or infinite.
    """
    if not np.isfinite(logits).all():
        raise InvalidRequestError(
            "the model's logits are not finite, so its weights have diverged; load an earlier checkpoint and "
            "lower the learning rate",
            field="weights",
            constraint="finite",
        )
    return logits.astype(np.float32, copy=False)


def log_softmax(logits: npt.NDArray[Any], temperature: float = 1.0) -> Floats:
    """Log-probabilities over the last axis, in nats, at a temperature above 0."""
    with np.errstate(over="ignore"):  # what is out of float32's reach is minus infinity
        shifted = logits - logits.max(axis=-1, keepdims=True)  # before dividing: a tiny temperature must not overflow
        if temperature != 1:
            shifted = (shifted.astype(np.float64) / temperature).astype(np.float32)
        total = np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)
        return np.asarray(shifted - np.log(total).astype(np.float32), dtype=np.float32)


def top_k(logprobs_V: Floats, k: int) -> tuple[npt.NDArray[np.int32], Floats]:
    """The k most likely tokens, most likely first, smaller ids first among equals; filled up with missing values."""
    ids_K, found_K = np.zeros(k, dtype=np.int32), np.full(k, MISSING_LOGPROB, dtype=np.float32)
    best = _largest(logprobs_V, k)
    ids_K[: best.size] = best
    found_K[: best.size] = logprobs_V[best]
    return ids_K, found_K


def _largest(values_V: Floats, k: int) -> Ints:
    """Ids of the k largest, largest first, smaller ids first among equals."""
    size = values_V.size
    if k >= size:
        ids = np.arange(size)
    else:
        least = np.partition(values_V, size - k)[size - k]
        ids = np.flatnonzero(values_V >= least)
    return np.asarray(ids[np.lexsort((ids, -values_V[ids]))][:k], dtype=np.int64)


def _nucleus(logprobs_V: Floats, among: Ints | None, p: float) -> Ints:
    """The smallest set of most likely tokens that holds at least p of what is left."""
    if among is None:
        # Whatever is less likely than (1-p)/V cannot be needed: all such tokens together hold less than 1-p.
        least = np.log((1 - p) / logprobs_V.size) - 1.0
        likely = np.flatnonzero(logprobs_V >= least)
        among = likely[np.lexsort((likely, -logprobs_V[likely]))]
        total = 1.0
    else:
        total = float(np.exp(logprobs_V[among]).sum(dtype=np.float64))
    shares = np.exp(logprobs_V[among].astype(np.float64)) / total
    before = np.cumsum(shares) - shares
    return np.asarray(among[before < p], dtype=np.int64)

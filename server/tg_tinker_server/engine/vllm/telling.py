"""vLLM's answers as the events that our own sampler would tell.

It chooses tokens and computes log-probabilities; where a sequence ends, and what text it is, is decided by the same
code as for our own. Shape suffixes: K alternatives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker.types.tokens import (
    MISSING_LOGPROB,
    SampledTokens,
    SampleQuery,
)
from tg_tinker_server.engine.sampling.choosing import Choice
from tg_tinker_server.engine.sampling.seam import SampledWeights
from tg_tinker_server.engine.sampling.telling import Teller, TextTeller, TokenTeller
from tg_tinker_server.engine.sampling.text_query import TextQuery

Row = Sequence[Sequence[float]]
"""Tokens at one position and their log-probabilities: [[id, value], ...]."""


def room_of(weights: SampledWeights, query: SampleQuery) -> int:
    """Most tokens that one sequence of a request may have."""
    # The last token is never read, so it may lie behind the model's last position.
    room = weights.max_positions - len(query.prompt) + 1
    most = query.params.max_tokens
    return room if most is None else min(room, most)


class SequenceTelling:
    """One sequence of a request.

    Attributes:
        room: most tokens that it may have.
        ended: whether it has all of them.
    """

    def __init__(self, weights: SampledWeights, query: SampleQuery, index: int) -> None:
        self.room = room_of(weights, query)
        self.ended = False
        self._topk, self._vocab_size, self._told = query.topk_sample_logprobs, weights.vocab_size, 0
        self._teller: Teller = (
            TextTeller(weights, query, index) if isinstance(query, TextQuery) else TokenTeller(weights, query, index)
        )

    def tell(self, tokens: Sequence[int], rows: Sequence[Row], *, ended: bool) -> list[SampledTokens]:
        """Events of new tokens. Those behind the end of the sequence are dropped.

        Args:
            rows: of each token its own log-probability, and those of the most likely ones.
            ended: vLLM will bring no more.

        Raises:
            InvalidRequestError: the log-probabilities are no numbers.
            ServerError: vLLM said something that cannot be.
        """
        events: list[SampledTokens] = []
        if len(rows) != len(tokens):
            raise _nonsense()
        for token, row in zip(tokens, rows, strict=True):
            found = {int(t): float(p) for t, p in row}
            if token not in found or not 0 <= token < self._vocab_size:
                raise _nonsense()
            if not math.isfinite(found[token]):
                raise _diverged()
            self._told += 1
            choice = Choice(token, found[token], most_likely(found, self._topk) if self._topk else None)
            event = self._teller.tell(choice, last=self._told == self.room)
            events.append(event)
            if event.stop_reason is not None:
                self.ended = True
                return events
        if ended:
            raise _nonsense()
        return events


def most_likely(found: dict[int, float], k: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """The k most likely tokens, most likely first, smaller ids first among equals; filled up with missing values."""
    ids_K, logprobs_K = np.zeros(k, dtype=np.int32), np.full(k, MISSING_LOGPROB, dtype=np.float32)
    best = sorted(found, key=lambda token: (-found[token], token))[:k]
    ids_K[: len(best)] = best
    logprobs_K[: len(best)] = [found[token] for token in best]
    return ids_K, logprobs_K


def _diverged() -> InvalidRequestError:
    return InvalidRequestError(
        "the model's logits are not finite, so its weights have diverged; load an earlier checkpoint and lower the "
        "learning rate",
        field="weights",
        constraint="finite",
    )


def _nonsense() -> ServerError:
    return ServerError("the vLLM engine gave an answer that does not fit the request; send it again")

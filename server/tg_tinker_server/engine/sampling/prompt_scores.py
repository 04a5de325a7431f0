"""What a request wants to know about its prompt, gathered from the logits of the prompt's positions as they come.

The logits at position i predict token i + 1, so nothing is known of position 0. Shape suffixes: N positions of the
prompt, K alternatives, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tg_tinker.types.tokens import MISSING_LOGPROB, PromptFigures, SampleQuery, TopkLogprobs
from tg_tinker_server.engine.sampling.choosing import draw, finite, generator_of, log_softmax, top_k

_DRAWS = 2**40  # index of the stream of draws for the prompt: no sequence has it


class PromptScores:
    """Figures of one prompt. ``first`` is the first position of which something is wanted; the length if nothing."""

    def __init__(self, query: SampleQuery, seed: int) -> None:
        self._query = query
        n = len(query.prompt)
        last = n if query.prompt_logprobs_last_n is None else query.prompt_logprobs_last_n
        self._from = max(1, n - last)
        self._targets = query.target_prompt_logprobs
        starts = [n]
        if query.prompt_logprobs or query.topk_prompt_logprobs:
            starts.append(self._from)
        if query.prompt_alt_tokens_k:
            starts.append(1)
        if self._targets is not None:
            named = np.flatnonzero((self._targets.reshape(n, -1)[1:] >= 0).any(axis=1))
            starts += [int(named[0]) + 1] if named.size else []
        self.first = min(starts)
        self._logprobs_N = np.full(n, np.nan, dtype=np.float32)
        self._topk = _missing(n, query.topk_prompt_logprobs)
        self._alt = _missing(n, query.prompt_alt_tokens_k)
        self._found = None if self._targets is None else np.full(self._targets.shape, np.nan, dtype=np.float32)
        self._rng = generator_of(seed, _DRAWS)

    @property
    def wanted(self) -> bool:
        """Whether logits of the prompt are needed."""
        return self.first < len(self._query.prompt)

    def add(self, start: int, logits_NV: npt.NDArray[Any]) -> None:
        """Take the logits at positions ``start`` and following.

        Raises:
            InvalidRequestError: they are not finite.
        """
        query = self._query
        for position, logits_V in enumerate(logits_NV, start + 1):
            if not self.first <= position < len(query.prompt):
                continue
            logits_V = finite(logits_V)  # noqa: PLW2901
            logprobs_V = log_softmax(logits_V)
            if position >= self._from:
                self._logprobs_N[position] = logprobs_V[query.prompt[position]]
                if query.topk_prompt_logprobs:
                    self._topk.token_ids[position], self._topk.logprobs[position] = top_k(
                        logprobs_V, query.topk_prompt_logprobs
                    )
            if self._targets is not None and self._found is not None:
                ids = np.atleast_1d(self._targets[position])
                found = np.where(ids >= 0, logprobs_V[np.maximum(ids, 0)], np.float32(np.nan))
                self._found[position] = found.reshape(self._targets.shape[1:])
            if query.prompt_alt_tokens_k:
                self._draw(position, logits_V, logprobs_V)

    def _draw(self, position: int, logits_V: npt.NDArray[np.float32], logprobs_V: npt.NDArray[np.float32]) -> None:
        count, temperature = self._query.prompt_alt_tokens_k, self._query.params.temperature
        if temperature == 0:
            ids = [int(np.argmax(logits_V))] * count
        else:
            weights_V = np.exp(log_softmax(logits_V, temperature))
            ids = [draw(weights_V, point) for point in self._rng.random(count)]
        self._alt.token_ids[position], self._alt.logprobs[position] = ids, logprobs_V[ids]

    def figures(self, *, hits: int) -> PromptFigures:
        """What was asked for."""
        query = self._query
        return PromptFigures(
            prompt_logprobs=[None if np.isnan(p) else float(p) for p in self._logprobs_N]
            if query.prompt_logprobs
            else None,
            topk_prompt_logprobs=self._topk if query.topk_prompt_logprobs else None,
            target_prompt_logprobs=self._found,
            prompt_alt_tokens=self._alt if query.prompt_alt_tokens_k else None,
            prompt_cache_hit_tokens=hits,
        )


def _missing(positions: int, k: int) -> TopkLogprobs:
    return TopkLogprobs(
        token_ids=np.zeros((positions, k), dtype=np.int32),
        logprobs=np.full((positions, k), MISSING_LOGPROB, dtype=np.float32),
    )

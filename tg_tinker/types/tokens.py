"""Sampling on tokens, in the shape of the public training API: what is asked, and what comes back.

Shape suffixes: N positions of a prompt, K alternatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from tg_tinker.errors import InvalidRequestError

StopReason = Literal["stop", "length"]
MISSING_LOGPROB = -99999.0
"""Stands where fewer than k alternatives exist."""
MOST_SAMPLES = 512
MOST_ALTERNATIVES = 128


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample. Applied in this order: temperature, top_k, top_p.

    Attributes:
        max_tokens: most tokens of one sequence; ``None``: until the model's context is full.
        seed: makes the choices repeatable; the samples of one request differ from each other all the same.
        stop: texts, or token ids, that end a sequence and are part of it; ``None``: the model's end-of-text tokens;
            an empty list: nothing.
        temperature: 0 is greedy.
        top_k: most likely tokens to keep; -1 keeps all.
        top_p: smallest set of tokens with at least this probability; 1 keeps all.

    Raises:
        InvalidRequestError: naming the option that is out of range.
    """

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | Sequence[str] | Sequence[int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0

    def __post_init__(self) -> None:
        rules = (
            ("max_tokens", self.max_tokens is None or 1 <= self.max_tokens < 2**31, "at least 1, or None"),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**64, "a 64-bit integer"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more, finite"),
            ("top_k", self.top_k == -1 or 1 <= self.top_k < 2**31, "-1 for all, or at least 1"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("stop", _is_stop(self.stop), "a text, texts, or token ids; at most 64"),
        )
        for name, holds, constraint in rules:
            if not holds:
                raise InvalidRequestError(
                    f"{name}={getattr(self, name)!r} is not possible; it must be {constraint}",
                    field=f"sampling_params.{name}",
                    constraint=constraint,
                )

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """Texts that end a sequence."""
        if isinstance(self.stop, str):
            return (self.stop,)
        return tuple(s for s in self.stop or () if isinstance(s, str))

    @property
    def stop_tokens(self) -> tuple[int, ...] | None:
        """Token ids that end a sequence; ``None``: the model's own."""
        if self.stop is None:
            return None
        return () if isinstance(self.stop, str) else tuple(s for s in self.stop if isinstance(s, int))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampleQuery:
    """One request for samples.

    Attributes:
        prompt: token ids.
        num_samples: sequences to sample.
        params: how.
        prompt_logprobs: also those of the prompt's tokens.
        topk_prompt_logprobs: that many most likely tokens at each position of the prompt; 0: none.
        topk_sample_logprobs: the same for what is sampled.
        target_prompt_logprobs: log-probabilities of these token ids, int64 [N] or [N, K], row i at position i; -1
            asks for nothing.
        prompt_alt_tokens_k: tokens drawn at each position of the prompt, independently, from the model's prediction
            of that position at the request's temperature.
        prompt_logprobs_last_n: of prompt_logprobs and topk_prompt_logprobs, only the last n positions are wanted.

    Raises:
        InvalidRequestError: naming what is out of range.
    """

    prompt: tuple[int, ...]
    num_samples: int = 1
    params: SamplingParams = field(default_factory=SamplingParams)
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: npt.NDArray[np.int64] | None = None
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None

    def __post_init__(self) -> None:
        targets = self.target_prompt_logprobs
        rules = (
            ("num_samples", 1 <= self.num_samples <= MOST_SAMPLES, f"1 to {MOST_SAMPLES}"),
            *(
                (name, 0 <= getattr(self, name) <= MOST_ALTERNATIVES, f"0 to {MOST_ALTERNATIVES}")
                for name in ("topk_prompt_logprobs", "topk_sample_logprobs", "prompt_alt_tokens_k")
            ),
            ("prompt_logprobs_last_n", (self.prompt_logprobs_last_n or 0) >= 0, "0 or more"),
            (
                "target_prompt_logprobs",
                targets is None or (targets.ndim in (1, 2) and len(targets) == len(self.prompt)),
                "one row for each token of the prompt",
            ),
        )
        for name, holds, constraint in rules:
            if not holds:
                raise InvalidRequestError(f"{name} must be {constraint}", field=name, constraint=constraint)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TopkLogprobs:
    """The k most likely tokens at each position, most likely first; where fewer: id 0 at ``MISSING_LOGPROB``.

    Attributes:
        token_ids: int32 [positions, k].
        logprobs: float32 [positions, k].
    """

    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledSequence:
    """One sampled sequence.

    Attributes:
        stop_reason: "stop": ended by a stop token or text, which is part of it; "length": by ``max_tokens``.
        tokens: token ids.
        logprobs: of each token under the tempered distribution, before top_k and top_p cut it; in nats.
        topk_logprobs: where asked for.
    """

    stop_reason: StopReason
    tokens: list[int]
    logprobs: list[float]
    topk_logprobs: TopkLogprobs | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleResponse:
    """What came of one request.

    Attributes:
        sequences: ``num_samples`` of them.
        prompt_logprobs: untempered, one for each token of the prompt, the first ``None``; ``None`` unless asked for.
        topk_prompt_logprobs: where asked for; the first row is missing values.
        target_prompt_logprobs: float32, of the shape asked for; NaN in row 0, which nothing precedes, and where the
            id is -1. Untempered.
        prompt_alt_tokens: where asked for; row i holds draws for position i and their untempered log-probabilities,
            in the order drawn; row 0 is missing values.
        prompt_cache_hit_tokens: tokens of the prompt that were not computed again.
    """

    sequences: list[SampledSequence]
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: TopkLogprobs | None = None
    target_prompt_logprobs: npt.NDArray[np.float32] | None = None
    prompt_alt_tokens: TopkLogprobs | None = None
    prompt_cache_hit_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampledTokens:
    """New tokens of one sequence, as they come.

    Attributes:
        index: which of the request's sequences.
        tokens, logprobs, topk_logprobs: as in ``SampledSequence``.
        stop_reason: set with the sequence's last tokens.
    """

    index: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    topk_logprobs: TopkLogprobs | None = None
    stop_reason: StopReason | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PromptFigures:
    """What was found about the prompt: the last thing that comes. Fields as in ``SampleResponse``."""

    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: TopkLogprobs | None = None
    target_prompt_logprobs: npt.NDArray[np.float32] | None = None
    prompt_alt_tokens: TopkLogprobs | None = None
    prompt_cache_hit_tokens: int = 0


SampleEvent = SampledTokens | PromptFigures


def response_of(events: Sequence[SampleEvent]) -> SampleResponse:
    """All events of one request as one response.

    Raises:
        ValueError: the events are not all of a request's: no figures at their end, or a sequence without an end.
    """
    *news, figures = events
    if not isinstance(figures, PromptFigures):
        raise ValueError("the events end before the request did")
    parts: dict[int, list[SampledTokens]] = {}
    for new in news:
        if not isinstance(new, SampledTokens):
            raise ValueError("events of two requests")
        parts.setdefault(new.index, []).append(new)
    return SampleResponse(
        sequences=[_sequence_of(parts.get(index, [])) for index in range(len(parts))],
        prompt_logprobs=figures.prompt_logprobs,
        topk_prompt_logprobs=figures.topk_prompt_logprobs,
        target_prompt_logprobs=figures.target_prompt_logprobs,
        prompt_alt_tokens=figures.prompt_alt_tokens,
        prompt_cache_hit_tokens=figures.prompt_cache_hit_tokens,
    )


def _sequence_of(parts: Sequence[SampledTokens]) -> SampledSequence:
    if not parts or parts[-1].stop_reason is None:
        raise ValueError("a sequence has no end")
    topk = [part.topk_logprobs for part in parts if part.topk_logprobs is not None]
    return SampledSequence(
        stop_reason=parts[-1].stop_reason,
        tokens=[token for part in parts for token in part.tokens],
        logprobs=[logprob for part in parts for logprob in part.logprobs],
        topk_logprobs=TopkLogprobs(
            token_ids=np.concatenate([t.token_ids for t in topk]),
            logprobs=np.concatenate([t.logprobs for t in topk]),
        )
        if topk
        else None,
    )


def _is_stop(stop: object) -> bool:
    if stop is None or isinstance(stop, str):
        return stop != ""
    if not isinstance(stop, Sequence) or len(stop) > 64:
        return False
    texts = all(isinstance(s, str) and 0 < len(s) <= 1000 for s in stop)
    return texts or all(isinstance(s, int) and not isinstance(s, bool) and 0 <= s < 2**31 for s in stop)

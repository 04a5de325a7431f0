"""Requests for text: prompts and options of ``sample`` as requests of the sampler, and what comes back."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types.sampling import GenerationOptions
from tg_tinker.types.tokens import SampledTokens, SampleQuery, SamplingParams
from tg_tinker_server.engine.sampling.seam import SampledWeights

FinishReason = Literal["length", "stop", "eos"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TextQuery(SampleQuery):
    """One prompt of a request for text. Its events are ``SampledText``.

    Attributes:
        options: as the caller gave them: penalties, and texts that end a completion. The rest is in ``params``.
        first: index of its first completion among those of the whole request. It names their random streams: each
            completion draws from one of its own, whatever the other prompts are.
    """

    options: GenerationOptions
    first: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampledText(SampledTokens):
    """New text of one completion.

    Attributes:
        index: of the completion among those of the whole request.
        tokens: generated tokens, the end-of-text token left out.
        text: whole characters, never part of a stop sequence. Joined over all events of an index it is the
            completion.
        finish_reason: set on the last event of this index.
    """

    text: str
    finish_reason: FinishReason | None = None


def text_queries(
    weights: SampledWeights, prompts: Sequence[Sequence[int]], options: GenerationOptions, *, completions: int = 1
) -> list[TextQuery]:
    """One query for each prompt, an empty prompt replaced by the start token. Indices are prompt-major.

    Raises:
        InvalidRequestError: no prompt, an unknown token id, or no room for one more token.
    """
    if not prompts:
        raise InvalidRequestError("no prompt was given", field="prompts", constraint="at least one")
    seed = secrets.randbits(63) if options.seed is None else options.seed
    most = 2**31 - 1
    queries = []
    for number, prompt in enumerate(prompts):
        ids = _checked(weights, prompt)
        params = SamplingParams(
            max_tokens=min(options.max_tokens, weights.max_positions - len(ids), most),
            seed=seed,
            temperature=options.temperature,
            top_k=min(options.top_k, most) if options.top_k else -1,
            top_p=options.top_p,
        )
        queries.append(
            TextQuery(prompt=ids, num_samples=completions, params=params, options=options, first=number * completions)
        )
    return queries


def _checked(weights: SampledWeights, prompt: Sequence[int]) -> tuple[int, ...]:
    ids = tuple(int(i) for i in prompt)
    if not ids and weights.start_token_id is not None:
        ids = (weights.start_token_id,)
    if not ids:
        raise InvalidRequestError(
            "a prompt is empty and this model has no start token", field="prompts", constraint="not empty"
        )
    if min(ids) < 0 or max(ids) >= weights.vocab_size:
        raise InvalidRequestError(
            f"a prompt holds token ids outside the model's vocabulary of {weights.vocab_size}",
            field="prompts",
            constraint=f"0 <= id < {weights.vocab_size}",
        )
    if len(ids) >= weights.max_positions:
        raise InvalidRequestError(
            f"a prompt of {len(ids)} tokens leaves no room to generate; this model takes {weights.max_positions} in "
            "all",
            field="prompts",
            constraint=f"fewer than {weights.max_positions} tokens",
        )
    return ids

"""What is asked of vLLM, and what is not: requests that it could not answer exactly go to the built-in sampler."""

from __future__ import annotations

import hashlib
from typing import Any

from tg_tinker.types.tokens import SampleQuery
from tg_tinker_server.engine.sampling.penalties import penalties_of
from tg_tinker_server.engine.sampling.seam import SampledWeights
from tg_tinker_server.engine.sampling.text_query import TextQuery

COLDEST = 0.01
"""vLLM takes lower temperatures for this one, but 0."""


def why_not(query: SampleQuery, *, vocab_size: int) -> str | None:
    """Why vLLM cannot answer a request as our docstrings promise; ``None``: it can.

    Our log-probabilities are of the tempered distribution before top_k and top_p cut it. vLLM tells those before
    temperature, or those after top_k and top_p; it is started for the latter. Those of a prompt it computes with the
    output layers of adapters that belong to other rows, as soon as it has more than one sequence (seen in 0.32).
    """
    params = query.params
    greedy = params.temperature == 0
    reasons = (
        ("top_k cuts what log-probabilities are told of", not greedy and 0 < params.top_k < vocab_size),
        ("top_p cuts what log-probabilities are told of", not greedy and params.top_p < 1),
        ("a temperature below 0.01", not greedy and params.temperature < COLDEST),
        ("log-probabilities of a prompt", query.prompt_logprobs or query.topk_prompt_logprobs > 0),
        ("target_prompt_logprobs", query.target_prompt_logprobs is not None),
        ("prompt_alt_tokens_k", query.prompt_alt_tokens_k > 0),
        ("penalties", _penalised(query)),
    )
    return next((reason for reason, holds in reasons if holds), None)


def _penalised(query: SampleQuery) -> bool:
    return isinstance(query, TextQuery) and penalties_of(query.options, prompt=(), vocab_size=1) is not None


def parameters(weights: SampledWeights, query: SampleQuery, *, index: int, room: int) -> dict[str, Any]:
    """vLLM's parameters for one sequence of a request; whatever else ends it is looked for in telling.py.

    Args:
        index: of the sequence.
        room: most tokens.
    """
    params, size = query.params, weights.vocab_size
    stops = params.stop_tokens
    asked: dict[str, Any] = {
        "max_tokens": room,
        "temperature": params.temperature,
        "logprobs": min(query.topk_sample_logprobs, size),
        "stop_token_ids": sorted({t for t in (weights.eos_token_ids if stops is None else stops) if t < size}),
    }
    if params.seed is not None:
        stream = query.first + index if isinstance(query, TextQuery) else index
        asked["seed"] = seed_of(params.seed, stream)
    return asked


def seed_of(seed: int, stream: int) -> int:
    """vLLM's seed of one of a request's sequences, 0 to 2**56, exclusive: each has a random stream of its own."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{stream}".encode()).digest()[:7], "big")

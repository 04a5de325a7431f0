"""Sampling on tokens, on the wire: requests, what is sampled as it comes, and samplers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker.proto.v1 import sampling_pb2
from tg_tinker.types.tokens import (
    PromptFigures,
    SampledTokens,
    SampleEvent,
    SampleQuery,
    SamplingParams,
    StopReason,
    TopkLogprobs,
)
from tg_tinker.wire.tensors import tensor_from_proto, tensor_to_proto

_STOP_REASONS: dict[str, StopReason | None] = {"": None, "stop": "stop", "length": "length"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerInfo:
    """Frozen weights with a name.

    Attributes:
        sampler_id: unique in the tenant.
        base_model: what they are, or are an adapter for.
        path: of the saved weights; empty: the base model itself.
    """

    sampler_id: str
    base_model: str
    path: str = ""


def sampler_to_proto(info: SamplerInfo) -> sampling_pb2.Sampler:
    """A sampler as a message."""
    return sampling_pb2.Sampler(sampler_id=info.sampler_id, base_model=info.base_model, path=info.path)


def sampler_from_proto(message: sampling_pb2.Sampler) -> SamplerInfo:
    """A sampler from a message."""
    return SamplerInfo(sampler_id=message.sampler_id, base_model=message.base_model, path=message.path)


def query_to_proto(query: SampleQuery, *, sampler_id: str) -> sampling_pb2.SampleTokensRequest:
    """A request as a message.

    Raises:
        InvalidRequestError: the prompt holds something that is no 64-bit integer.
    """
    targets = query.target_prompt_logprobs
    try:
        prompt = np.array(query.prompt, dtype="<i8").tobytes()
    except (OverflowError, TypeError, ValueError) as e:
        raise InvalidRequestError(
            "the prompt holds something that is no token id", field="prompt", constraint="integers"
        ) from e
    return sampling_pb2.SampleTokensRequest(
        sampler_id=sampler_id,
        prompt=prompt,
        num_samples=query.num_samples,
        params=params_to_proto(query.params),
        prompt_logprobs=query.prompt_logprobs,
        topk_prompt_logprobs=query.topk_prompt_logprobs,
        topk_sample_logprobs=query.topk_sample_logprobs,
        target_prompt_logprobs=None if targets is None else tensor_to_proto(targets),
        prompt_alt_tokens_k=query.prompt_alt_tokens_k,
        prompt_logprobs_last_n=query.prompt_logprobs_last_n,
    )


def query_from_proto(message: sampling_pb2.SampleTokensRequest) -> SampleQuery:
    """A request from a message.

    Raises:
        InvalidRequestError: naming what cannot be what it says.
    """
    targets = None
    if message.HasField("target_prompt_logprobs"):
        targets = tensor_from_proto(message.target_prompt_logprobs, field="target_prompt_logprobs")
        if targets.dtype != np.int64:
            raise InvalidRequestError(
                f"target_prompt_logprobs are {targets.dtype}; send token ids as int64",
                field="target_prompt_logprobs",
                constraint="int64",
            )
    return SampleQuery(
        prompt=tuple(_numbers(message.prompt, "<i8", field="prompt").tolist()),
        num_samples=message.num_samples,
        params=params_from_proto(message.params),
        prompt_logprobs=message.prompt_logprobs,
        topk_prompt_logprobs=message.topk_prompt_logprobs,
        topk_sample_logprobs=message.topk_sample_logprobs,
        target_prompt_logprobs=targets,
        prompt_alt_tokens_k=message.prompt_alt_tokens_k,
        prompt_logprobs_last_n=message.prompt_logprobs_last_n if message.HasField("prompt_logprobs_last_n") else None,
    )


def params_to_proto(params: SamplingParams) -> sampling_pb2.TokenSamplingParams:
    """How to sample, as a message."""
    message = sampling_pb2.TokenSamplingParams(
        max_tokens=params.max_tokens, temperature=params.temperature, top_k=params.top_k, top_p=params.top_p
    )
    if params.seed is not None:
        setattr(message, "small_seed" if params.seed < 2**63 else "large_seed", params.seed)
    if isinstance(params.stop, str):
        message.stop_text = params.stop
    elif params.stop_texts:
        message.stop_texts.texts.extend(params.stop_texts)
    elif params.stop is not None:
        message.stop_tokens.SetInParent()
        message.stop_tokens.ids.extend(params.stop_tokens or ())
    return message


def params_from_proto(message: sampling_pb2.TokenSamplingParams) -> SamplingParams:
    """How to sample, from a message."""
    seed, stop = message.WhichOneof("seed"), message.WhichOneof("stop")
    stops: str | Sequence[str] | Sequence[int] | None = None
    if stop == "stop_text":
        stops = message.stop_text
    elif stop == "stop_texts":
        stops = list(message.stop_texts.texts)
    elif stop == "stop_tokens":
        stops = list(message.stop_tokens.ids)
    return SamplingParams(
        max_tokens=message.max_tokens if message.HasField("max_tokens") else None,
        seed=None if seed is None else getattr(message, seed),
        stop=stops,
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
    )


def events_to_proto(events: Iterable[SampleEvent]) -> sampling_pb2.SampleTokensReply:
    """Events of one request as one reply."""
    reply = sampling_pb2.SampleTokensReply()
    for event in events:
        if isinstance(event, PromptFigures):
            reply.prompt.CopyFrom(_figures_to_proto(event))
            continue
        reply.sequences.add(
            index=event.index,
            tokens=np.array(event.tokens, dtype="<i4").tobytes(),
            logprobs=np.array(event.logprobs, dtype="<f4").tobytes(),
            topk_logprobs=topk_to_proto(event.topk_logprobs),
            stop_reason=event.stop_reason or "",
        )
    return reply


def events_from_proto(reply: sampling_pb2.SampleTokensReply) -> list[SampleEvent]:
    """Events of one reply, in their order; ``types.tokens.response_of`` makes a response of all of a request.

    Raises:
        ServerError: the reply says what no server says.
    """
    events: list[SampleEvent] = []
    for part in reply.sequences:
        if part.stop_reason not in _STOP_REASONS:
            raise ServerError(f"a sequence stopped for an unknown reason, {part.stop_reason[:40]!r}")
        events.append(
            SampledTokens(
                index=part.index,
                tokens=tuple(_numbers(part.tokens, "<i4", field="tokens").tolist()),
                logprobs=tuple(_numbers(part.logprobs, "<f4", field="logprobs").tolist()),
                topk_logprobs=topk_from_proto(part.topk_logprobs) if part.HasField("topk_logprobs") else None,
                stop_reason=_STOP_REASONS[part.stop_reason],
            )
        )
    if reply.HasField("prompt"):
        events.append(_figures_from_proto(reply.prompt))
    return events


def topk_to_proto(topk: TopkLogprobs | None) -> sampling_pb2.TopkTokens | None:
    """Alternatives as a message."""
    if topk is None:
        return None
    return sampling_pb2.TopkTokens(token_ids=tensor_to_proto(topk.token_ids), logprobs=tensor_to_proto(topk.logprobs))


def topk_from_proto(message: sampling_pb2.TopkTokens) -> TopkLogprobs:
    """Alternatives from a message."""
    return TopkLogprobs(
        token_ids=tensor_from_proto(message.token_ids, field="token_ids"),
        logprobs=tensor_from_proto(message.logprobs, field="logprobs"),
    )


def _figures_to_proto(figures: PromptFigures) -> sampling_pb2.PromptFigures:
    logprobs, targets = figures.prompt_logprobs, figures.target_prompt_logprobs
    return sampling_pb2.PromptFigures(
        has_logprobs=logprobs is not None,
        logprobs=np.array([np.nan if p is None else p for p in logprobs or ()], dtype="<f4").tobytes(),
        topk_logprobs=topk_to_proto(figures.topk_prompt_logprobs),
        target_logprobs=None if targets is None else tensor_to_proto(targets),
        alt_tokens=topk_to_proto(figures.prompt_alt_tokens),
        cache_hit_tokens=figures.prompt_cache_hit_tokens,
    )


def _figures_from_proto(message: sampling_pb2.PromptFigures) -> PromptFigures:
    logprobs = _numbers(message.logprobs, "<f4", field="logprobs")
    return PromptFigures(
        prompt_logprobs=[None if np.isnan(p) else float(p) for p in logprobs] if message.has_logprobs else None,
        topk_prompt_logprobs=topk_from_proto(message.topk_logprobs) if message.HasField("topk_logprobs") else None,
        target_prompt_logprobs=tensor_from_proto(message.target_logprobs, field="target_logprobs")
        if message.HasField("target_logprobs")
        else None,
        prompt_alt_tokens=topk_from_proto(message.alt_tokens) if message.HasField("alt_tokens") else None,
        prompt_cache_hit_tokens=message.cache_hit_tokens,
    )


def _numbers(data: bytes, dtype: str, *, field: str) -> npt.NDArray[np.generic]:
    if len(data) % np.dtype(dtype).itemsize:
        raise InvalidRequestError(
            f"{field} has {len(data)} bytes, which are no whole numbers", field=field, constraint=f"{dtype} numbers"
        )
    return np.frombuffer(data, dtype=dtype)

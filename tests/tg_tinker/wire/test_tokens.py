"""Requests and events of token sampling survive the wire."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker.proto.v1 import sampling_pb2
from tg_tinker.types.tokens import (
    PromptFigures,
    SampledTokens,
    SampleQuery,
    SamplingParams,
    TopkLogprobs,
    response_of,
)
from tg_tinker.wire.tokens import (
    SamplerInfo,
    events_from_proto,
    events_to_proto,
    query_from_proto,
    query_to_proto,
    sampler_from_proto,
    sampler_to_proto,
)

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
STOP = TEXT.filter(bool)
PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.none() | st.integers(1, 2**31 - 1),
    seed=st.none() | st.integers(-(2**63), 2**64 - 1),
    stop=st.none() | STOP | st.lists(STOP, max_size=3) | st.lists(st.integers(0, 2**31 - 1), max_size=3),
    temperature=st.floats(0, 10),
    top_k=st.just(-1) | st.integers(1, 10**6),
    top_p=st.floats(0.01, 1),
)
FLOATS = st.floats(-100, 0, width=32)


@st.composite
def queries(draw):
    prompt = tuple(draw(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=6)))
    wide = draw(st.none() | st.sampled_from([(), (2,)]))
    targets = None if wide is None else np.arange(len(prompt) * (2 if wide else 1)).reshape(len(prompt), *wide)
    return SampleQuery(
        prompt=prompt,
        num_samples=draw(st.integers(1, 512)),
        params=draw(PARAMS),
        prompt_logprobs=draw(st.booleans()),
        topk_prompt_logprobs=draw(st.integers(0, 128)),
        topk_sample_logprobs=draw(st.integers(0, 128)),
        target_prompt_logprobs=targets,
        prompt_alt_tokens_k=draw(st.integers(0, 128)),
        prompt_logprobs_last_n=draw(st.none() | st.integers(0, 2**40)),
    )


def topk(rows: int, k: int) -> TopkLogprobs:
    ids = np.arange(rows * k, dtype=np.int32).reshape(rows, k)
    return TopkLogprobs(token_ids=ids, logprobs=-ids.astype(np.float32))


@st.composite
def chunks(draw):
    rows = draw(st.integers(0, 3))
    return SampledTokens(
        index=draw(st.integers(0, 600)),
        tokens=tuple(draw(st.lists(st.integers(0, 2**31 - 1), min_size=rows, max_size=rows))),
        logprobs=tuple(draw(st.lists(FLOATS, min_size=rows, max_size=rows))),
        topk_logprobs=draw(st.sampled_from([None, topk(rows, 2)])),
        stop_reason=draw(st.sampled_from([None, "stop", "length"])),
    )


FIGURES = st.builds(
    PromptFigures,
    prompt_logprobs=st.none() | st.lists(st.none() | FLOATS, max_size=4),
    topk_prompt_logprobs=st.sampled_from([None, topk(3, 2)]),
    target_prompt_logprobs=st.sampled_from([None, np.array([np.nan, -1.5], dtype=np.float32)]),
    prompt_alt_tokens=st.sampled_from([None, topk(2, 1)]),
    prompt_cache_hit_tokens=st.integers(0, 2**40),
)


def plain(value):
    """Nested values that can be compared: arrays by dtype, shape and bytes."""
    if isinstance(value, np.ndarray):
        return (value.dtype.name, value.shape, value.tobytes())
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


@given(queries())
def test_a_request_is_the_same_after_the_wire(query) -> None:
    message = query_to_proto(query, sampler_id="s")
    read = sampling_pb2.SampleTokensRequest.FromString(message.SerializeToString())
    assert plain(query_from_proto(read)) == plain(query)
    assert read.sampler_id == "s"


@given(st.lists(chunks(), max_size=3), st.none() | FIGURES)
def test_events_are_the_same_after_the_wire(events, figures) -> None:
    all_events = [*events, *([] if figures is None else [figures])]
    message = events_to_proto(all_events)
    read = sampling_pb2.SampleTokensReply.FromString(message.SerializeToString())
    assert plain(events_from_proto(read)) == plain(all_events)


@given(TEXT, TEXT, TEXT)
def test_a_sampler_is_the_same_after_the_wire(sampler_id, base_model, path) -> None:
    info = SamplerInfo(sampler_id=sampler_id, base_model=base_model, path=path)
    assert sampler_from_proto(sampler_to_proto(info)) == info


def test_no_stop_at_all_is_not_the_models_own_stops() -> None:
    nothing = SampleQuery(prompt=(1,), params=SamplingParams(stop=[]))
    assert query_from_proto(query_to_proto(nothing, sampler_id="s")).params.stop_tokens == ()
    default = SampleQuery(prompt=(1,))
    assert query_from_proto(query_to_proto(default, sampler_id="s")).params.stop_tokens is None


def test_half_a_number_and_other_targets_are_refused_by_name() -> None:
    good = query_to_proto(SampleQuery(prompt=(1, 2)), sampler_id="s")
    half = sampling_pb2.SampleTokensRequest()
    half.CopyFrom(good)
    half.prompt = b"\x01\x02"
    with pytest.raises(InvalidRequestError, match="prompt"):
        query_from_proto(half)
    good.target_prompt_logprobs.dtype = "float32"
    good.target_prompt_logprobs.shape.append(2)
    good.target_prompt_logprobs.data = bytes(8)
    with pytest.raises(InvalidRequestError, match="int64"):
        query_from_proto(good)
    with pytest.raises(InvalidRequestError, match="prompt"):
        query_to_proto(SampleQuery(prompt=(2**70,)), sampler_id="s")
    with pytest.raises(ServerError, match="unknown reason"):
        events_from_proto(sampling_pb2.SampleTokensReply(sequences=[{"stop_reason": "bored"}]))


def test_events_of_a_request_make_its_response() -> None:
    events = [
        SampledTokens(index=1, tokens=(4,), logprobs=(-1.0,), topk_logprobs=topk(1, 2)),
        SampledTokens(index=0, tokens=(), logprobs=(), stop_reason="length"),
        SampledTokens(index=1, tokens=(5, 6), logprobs=(-2.0, -3.0), topk_logprobs=topk(2, 2), stop_reason="stop"),
        PromptFigures(prompt_logprobs=[None, -0.5], prompt_cache_hit_tokens=3),
    ]
    response = response_of(events)
    assert [s.tokens for s in response.sequences] == [[], [4, 5, 6]]
    assert [s.stop_reason for s in response.sequences] == ["length", "stop"]
    assert response.sequences[1].logprobs == [-1.0, -2.0, -3.0]
    assert response.sequences[1].topk_logprobs is not None
    assert response.sequences[1].topk_logprobs.token_ids.tolist() == [[0, 1], [0, 1], [2, 3]]
    assert (response.prompt_logprobs, response.prompt_cache_hit_tokens) == ([None, -0.5], 3)
    with pytest.raises(ValueError, match="before the request did"):
        response_of(events[:-1])
    with pytest.raises(ValueError, match="no end"):
        response_of([events[0], events[1], events[3]])

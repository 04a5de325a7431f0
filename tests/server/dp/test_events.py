"""Events are valid or do not exist, and what is not understood is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from tg_tinker_server.dp.events import (
    Event,
    Gaussian,
    ParticipationGaussian,
    SampledGaussian,
    Unnoised,
    amplified,
    event_from_json,
    event_to_json,
)

sigmas = st.floats(min_value=1e-300, max_value=1e300)
events: st.SearchStrategy[Event] = st.one_of(
    st.builds(Gaussian, noise_multiplier=sigmas),
    st.builds(
        SampledGaussian,
        noise_multiplier=sigmas,
        sample_rate=st.floats(min_value=0, max_value=1, exclude_min=True),
        vouched_by=st.sampled_from(["server", "client"]),
    ),
    st.builds(ParticipationGaussian, noise_multiplier=sigmas, releases=st.integers(0, 10**9)),
    st.just(Unnoised()),
)


@given(events)
def test_an_event_reads_back_from_canonical_json_exactly(event: Event) -> None:
    document = json.loads(rfc8785.dumps(event_to_json(event)))
    assert event_from_json(document) == event
    assert not any(isinstance(v, float) for v in document.values())  # numbers are decimal strings


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf])
def test_noise_that_is_not_positive_and_finite_is_no_event(sigma: float) -> None:
    for build in (
        lambda: Gaussian(noise_multiplier=sigma),
        lambda: SampledGaussian(noise_multiplier=sigma, sample_rate=0.5, vouched_by="server"),
        lambda: ParticipationGaussian(noise_multiplier=sigma, releases=1),
    ):
        with pytest.raises(ValueError, match="noise_multiplier"):
            build()


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.0001, math.nan])
def test_a_rate_outside_0_to_1_is_no_event(rate: float) -> None:
    with pytest.raises(ValueError, match="sample_rate"):
        SampledGaussian(noise_multiplier=1.0, sample_rate=rate, vouched_by="server")


def test_amplification_needs_somebody_who_vouches_for_it() -> None:
    with pytest.raises(TypeError):
        SampledGaussian(noise_multiplier=1.0, sample_rate=0.5)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="vouched_by"):
        SampledGaussian(noise_multiplier=1.0, sample_rate=0.5, vouched_by="nobody")  # type: ignore[arg-type]
    assert amplified(SampledGaussian(noise_multiplier=1.0, sample_rate=0.5, vouched_by="client"))
    assert not amplified(SampledGaussian(noise_multiplier=1.0, sample_rate=1.0, vouched_by="client"))
    assert not amplified(Gaussian(noise_multiplier=1.0))


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"kind": "laplace", "scale": "1.0"},
        {"kind": "gaussian"},
        {"kind": "gaussian", "noise_multiplier": 1.0},
        {"kind": "gaussian", "noise_multiplier": "inf"},
        {"kind": "gaussian", "noise_multiplier": "nan"},
        {"kind": "gaussian", "noise_multiplier": "-1.0"},
        {"kind": "gaussian", "noise_multiplier": " 1.0"},
        {"kind": "gaussian", "noise_multiplier": "1.0", "sample_rate": "0.1"},
        {"kind": "sampled_gaussian", "noise_multiplier": "1.0", "sample_rate": "0.1"},
        {"kind": "sampled_gaussian", "noise_multiplier": "1.0", "sample_rate": "2.0", "vouched_by": "server"},
        {"kind": "participation_gaussian", "noise_multiplier": "1.0", "releases": True},
        {"kind": "participation_gaussian", "noise_multiplier": "1.0", "releases": -1},
        {"kind": "unnoised", "epsilon": "0.0"},
    ],
)
def test_a_document_that_is_not_fully_understood_is_refused(document: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        event_from_json(document)


def test_events_are_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Gaussian(noise_multiplier=1.0).noise_multiplier = 9.0  # type: ignore[misc]


def test_what_is_not_an_event_has_no_document() -> None:
    with pytest.raises(ValueError, match="not a privacy event: str"):
        event_to_json("gaussian")  # type: ignore[arg-type]

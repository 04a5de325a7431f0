import dataclasses
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tg_tinker.errors import DPBudgetExceededError, FutureCancelledError
from tg_tinker.proto.v1 import runs_pb2, training_pb2
from tg_tinker.types import (
    DPMetrics,
    EncryptionInfo,
    ForwardBackwardOutput,
    LoadStateResult,
    OptimStepOutput,
    Sample,
    SampleResult,
    SavedState,
    StreamChunk,
)
from tg_tinker.wire.calls import Position
from tg_tinker.wire.operations import (
    FutureState,
    Submission,
    asked_for,
    cancel_future_request,
    future_from_proto,
    future_to_proto,
    get_future_request,
    resume_request,
    submission_from_proto,
    submission_to_proto,
)
from tg_tinker.wire.results import RESULTS, chunk_from_proto, chunk_to_proto

HERE = Position(run_id="run_1", seq=3, handle="")
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
NUMBER = st.floats(allow_nan=False)
COUNT = st.integers(-(2**63), 2**63 - 1)
UNSIGNED = st.integers(0, 2**64 - 1)
TIME = st.datetimes(datetime(1970, 1, 1), datetime(9999, 12, 31), timezones=st.just(UTC))
METRICS = st.dictionaries(TEXT, NUMBER, max_size=3)
METADATA = st.dictionaries(TEXT, TEXT | st.integers(-9, 9), max_size=3)
DP = st.builds(
    DPMetrics,
    noise_applied=st.booleans(),
    epsilon_spent=NUMBER,
    total_epsilon=NUMBER,
    delta=NUMBER,
    grad_norm_before_clip=NUMBER,
    grad_norm_after_clip=NUMBER,
    num_clipped=COUNT,
)
RESULT = {
    "forward_backward": st.builds(
        ForwardBackwardOutput,
        loss=NUMBER,
        batch_hash=TEXT,
        gradient_hash=TEXT,
        num_tokens=COUNT,
        latency_ms=NUMBER,
        metrics=METRICS,
    ),
    "optim_step": st.builds(
        OptimStepOutput,
        grad_norm=NUMBER,
        learning_rate=NUMBER,
        step=COUNT,
        dp_metrics=st.none() | DP,
        latency_ms=NUMBER,
        metrics=METRICS,
    ),
    "sample": st.builds(
        SampleResult,
        samples=st.lists(
            st.builds(
                Sample,
                prompt=TEXT,
                completion=TEXT,
                num_tokens=COUNT,
                finish_reason=st.sampled_from(["length", "stop", "eos"]),
                latency_ms=NUMBER,
            ),
            max_size=3,
        ),
        total_tokens=COUNT,
        latency_ms=NUMBER,
    ),
    "save_state": st.builds(
        SavedState,
        artifact_id=TEXT,
        size_bytes=COUNT,
        encryption=st.builds(EncryptionInfo, algorithm=TEXT, key_id=TEXT),
        metadata=METADATA,
        timestamp=TIME,
        path=TEXT,
        content_hash=TEXT,
    ),
    "load_state": st.builds(LoadStateResult, artifact_id=TEXT, step=COUNT, metadata=METADATA, timestamp=TIME),
}


def through_the_wire(state):
    return future_from_proto(runs_pb2.FutureReply.FromString(future_to_proto(state).SerializeToString()))


@given(st.sampled_from(sorted(RESULTS)).flatmap(lambda n: st.tuples(st.just(n), RESULT[n])), UNSIGNED)
def test_a_completed_future_survives_the_wire_with_its_result(named, durable):
    name, result = named
    state = FutureState(
        future_id="run_1.3",
        position=HERE,
        status="completed",
        operation=name,
        server_epoch="e",
        expected_seq=4,
        durable_seq=durable,
        result=result,
    )
    assert through_the_wire(state) == state


@pytest.mark.parametrize("status", ["pending", "running", "unknown"])
def test_an_unfinished_future_survives_the_wire(status):
    state = FutureState(future_id="run_1.3", position=HERE, status=status, operation="sample")
    assert through_the_wire(state) == state


@pytest.mark.parametrize(
    ("status", "error"),
    [
        ("failed", DPBudgetExceededError("over", current_epsilon=3.9, max_epsilon=4.0, delta=1e-5)),
        ("cancelled", FutureCancelledError("gone", future_id="run_1.3")),
    ],
)
def test_a_failed_future_survives_the_wire_with_its_error(status, error):
    state = FutureState(future_id="run_1.3", position=HERE, status=status, error=error)
    back = through_the_wire(state)
    assert type(back.error) is type(error)
    assert back.error.details == error.details
    assert dataclasses.replace(back, error=None) == dataclasses.replace(state, error=None)


def test_a_status_from_a_newer_server_is_unknown_rather_than_a_crash():
    assert future_from_proto(runs_pb2.FutureReply(status=77)).status == "unknown"
    assert future_from_proto(runs_pb2.FutureReply()).status == "unknown"


@given(st.builds(Submission, future_id=TEXT, server_epoch=TEXT, expected_seq=UNSIGNED, durable_seq=UNSIGNED))
def test_a_submission_survives_the_wire(answer):
    assert submission_from_proto(submission_to_proto(answer)) == answer


@given(st.builds(StreamChunk, TEXT, COUNT, st.lists(COUNT), st.none() | TEXT.filter(bool)))
def test_a_chunk_survives_the_wire(chunk):
    assert chunk_from_proto(chunk_to_proto(chunk)) == chunk


def test_futures_are_asked_for_by_id_or_by_position():
    assert asked_for(get_future_request("run_1.3", wait_s=2.5).key) == "run_1.3"
    assert asked_for(cancel_future_request(HERE).key) == HERE
    assert asked_for(runs_pb2.OneofKey()) == ""
    assert get_future_request(HERE, wait_s=2.5).wait_s == 2.5
    assert list(resume_request("run_1", {5, 3}).finished_seqs) == [3, 5]


def test_the_result_fields_of_a_future_are_exactly_the_operations():
    fields = {f.name for f in runs_pb2.FutureReply.DESCRIPTOR.oneofs_by_name["result"].fields}
    assert fields == {*RESULTS, "error"}
    assert training_pb2.DESCRIPTOR.package == "tg_tinker.v1"

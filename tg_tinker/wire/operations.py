"""Where an operation stands: submissions, futures and their outcomes on the wire."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tg_tinker.errors import TGTinkerError
from tg_tinker.proto.v1 import common_pb2, runs_pb2, training_pb2
from tg_tinker.wire.call_messages import position_from_proto, position_to_proto
from tg_tinker.wire.calls import Position
from tg_tinker.wire.results import RESULTS, Result
from tg_tinker.wire.status import error_from_status, error_to_status

PENDING, RUNNING, UNKNOWN = "pending", "running", "unknown"
COMPLETED, FAILED, CANCELLED = "completed", "failed", "cancelled"
ENDED = (COMPLETED, FAILED, CANCELLED)
_STATUS_OF_NUMBER = {
    common_pb2.OperationStatus.Value(f"OPERATION_STATUS_{status.upper()}"): status
    for status in (PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, UNKNOWN)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """The answer to a submission; see the protocol file for the numbers."""

    future_id: str = ""
    server_epoch: str = ""
    expected_seq: int = 0
    durable_seq: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FutureState:
    """The answer to GetFuture.

    Attributes:
        status: pending, running, completed, failed, cancelled, or unknown: this server process never had it.
        result: set when completed.
        error: set when failed or cancelled.
    """

    future_id: str
    position: Position
    status: str
    operation: str = ""
    server_epoch: str = ""
    expected_seq: int = 0
    durable_seq: int = 0
    result: Result | None = None
    error: TGTinkerError | None = None


def submission_to_proto(answer: Submission) -> training_pb2.Submitted:
    """A submission's answer as a message."""
    return training_pb2.Submitted(
        future_id=answer.future_id,
        server_epoch=answer.server_epoch,
        expected_seq=answer.expected_seq,
        durable_seq=answer.durable_seq,
    )


def submission_from_proto(message: training_pb2.Submitted) -> Submission:
    """A submission's answer from a message."""
    return Submission(
        future_id=message.future_id,
        server_epoch=message.server_epoch,
        expected_seq=message.expected_seq,
        durable_seq=message.durable_seq,
    )


def future_to_proto(state: FutureState) -> runs_pb2.FutureReply:
    """A future's state as a message; the result's field is named after the operation."""
    reply = runs_pb2.FutureReply(
        future_id=state.future_id,
        status=f"OPERATION_STATUS_{state.status.upper()}",
        operation=state.operation,
        server_epoch=state.server_epoch,
        expected_seq=state.expected_seq,
        durable_seq=state.durable_seq,
        key=position_to_proto(state.position),
    )
    if state.error is not None:
        reply.error.CopyFrom(error_to_status(state.error))
    elif state.result is not None:
        name, to_proto = next((n, row[1]) for n, row in RESULTS.items() if isinstance(state.result, row[0]))
        getattr(reply, name).CopyFrom(to_proto(state.result))
    return reply


def future_from_proto(reply: runs_pb2.FutureReply) -> FutureState:
    """A future's state from a message."""
    which = reply.WhichOneof("result")
    result = RESULTS[which][2](getattr(reply, which)) if which in RESULTS else None
    return FutureState(
        future_id=reply.future_id,
        position=position_from_proto(reply.key),
        status=_STATUS_OF_NUMBER.get(reply.status, UNKNOWN),
        operation=reply.operation,
        server_epoch=reply.server_epoch,
        expected_seq=reply.expected_seq,
        durable_seq=reply.durable_seq,
        result=result,
        error=error_from_status(reply.error) if which == "error" else None,
    )


def get_future_request(by: str | Position, *, wait_s: float) -> runs_pb2.GetFutureRequest:
    """Ask for an operation by future id or by position, waiting up to ``wait_s`` seconds for its end."""
    return runs_pb2.GetFutureRequest(key=_key(by), wait_s=wait_s)


def cancel_future_request(by: str | Position) -> runs_pb2.CancelFutureRequest:
    """Ask to cancel an operation."""
    return runs_pb2.CancelFutureRequest(key=_key(by))


def asked_for(key: runs_pb2.OneofKey) -> str | Position:
    """The future id or the position in a GetFuture or CancelFuture request; empty text if neither was given."""
    return position_from_proto(key.operation) if key.WhichOneof("by") == "operation" else key.future_id


def resume_request(run_id: str, finished_seqs: Iterable[int]) -> runs_pb2.ResumeTrainingClientRequest:
    """Say which operations ended for good without an effect on the weights."""
    return runs_pb2.ResumeTrainingClientRequest(run_id=run_id, finished_seqs=sorted(finished_seqs))


def _key(by: str | Position) -> runs_pb2.OneofKey:
    if isinstance(by, str):
        return runs_pb2.OneofKey(future_id=by)
    return runs_pb2.OneofKey(operation=position_to_proto(by))

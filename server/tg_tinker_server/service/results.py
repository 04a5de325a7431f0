"""Outcomes of operations as bytes, for keeping them sealed at rest."""

from __future__ import annotations

from google.protobuf.message import DecodeError

from tg_tinker.errors import ServerError, TGTinkerError
from tg_tinker.proto.v1 import runs_pb2
from tg_tinker.wire.calls import Position
from tg_tinker.wire.operations import COMPLETED, FAILED, FutureState, future_from_proto, future_to_proto
from tg_tinker.wire.results import Result

_NOWHERE = Position(run_id="", seq=0)


def result_to_bytes(result: Result | None, error: TGTinkerError | None) -> bytes:
    """An outcome, in the encoding of the protocol."""
    status = FAILED if error else COMPLETED
    state = FutureState(future_id="", position=_NOWHERE, status=status, result=result, error=error)
    return future_to_proto(state).SerializeToString()


def result_from_bytes(data: bytes) -> tuple[Result | None, TGTinkerError | None]:
    """The outcome that was kept."""
    try:
        state = future_from_proto(runs_pb2.FutureReply.FromString(data))
    except DecodeError as e:
        raise ServerError("a kept result cannot be read") from e
    return state.result, state.error

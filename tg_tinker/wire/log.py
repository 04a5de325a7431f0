"""The transparency log on the wire: checkpoints with their proofs, receipts."""

from __future__ import annotations

from collections.abc import Iterable

from tg_tinker.errors import ServerError
from tg_tinker.proto.v1 import common_pb2, privacy_pb2
from tg_tinker.types.log import LogReceipt, LogState


def log_state_to_proto(state: LogState) -> common_pb2.LogState:
    """A log's state as a message."""
    return common_pb2.LogState(
        checkpoint=state.checkpoint,
        verifier_key=state.verifier_key,
        known_size=state.known_size,
        consistency=state.consistency,
    )


def log_state_from_proto(message: common_pb2.LogState) -> LogState:
    """A log's state from a message; not verified."""
    return LogState(
        checkpoint=message.checkpoint,
        verifier_key=message.verifier_key,
        known_size=message.known_size,
        consistency=tuple(message.consistency),
    )


def receipt_to_proto(receipt: LogReceipt) -> common_pb2.Receipt:
    """A receipt as a message."""
    return common_pb2.Receipt(
        entry_json=receipt.entry_json,
        leaf_index=receipt.leaf_index,
        inclusion=receipt.inclusion,
        log=log_state_to_proto(receipt.log),
    )


def receipt_from_proto(message: common_pb2.Receipt) -> LogReceipt:
    """A receipt from a message; not verified."""
    return LogReceipt(
        entry_json=message.entry_json,
        leaf_index=message.leaf_index,
        inclusion=tuple(message.inclusion),
        log=log_state_from_proto(message.log),
    )


def checkpoint_request(known_sizes: Iterable[int]) -> privacy_pb2.GetCheckpointRequest:
    """Ask for the log as it stands, proven from each of these sizes."""
    return privacy_pb2.GetCheckpointRequest(known_sizes=sorted(set(known_sizes)))


def checkpoint_to_proto(states: Iterable[LogState]) -> privacy_pb2.GetCheckpointReply:
    """One checkpoint with its proofs as a message."""
    return privacy_pb2.GetCheckpointReply(states=[log_state_to_proto(s) for s in states])


def checkpoint_from_proto(reply: privacy_pb2.GetCheckpointReply) -> list[LogState]:
    """One checkpoint with its proofs from a message; not verified.

    Raises:
        ServerError: there is none in it.
    """
    if not reply.states:
        raise ServerError("the server answered without a checkpoint of its log; its version may be too old")
    return [log_state_from_proto(s) for s in reply.states]


def log_entries_request(start: int, count: int) -> privacy_pb2.GetLogEntriesRequest:
    """Ask for consecutive entries of the log."""
    return privacy_pb2.GetLogEntriesRequest(start=start, count=count)

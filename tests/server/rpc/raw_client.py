"""Calls methods by name over a real channel, so that tests can send what no client would."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
from google.protobuf.message import Message
from google.rpc import status_pb2

from tg_tinker.errors import TGTinkerError
from tg_tinker.proto.v1 import runs_pb2
from tg_tinker.types import BatchData, TrainingConfig
from tg_tinker.wire.call_messages import call_to_proto
from tg_tinker.wire.calls import Call, Pass, Position
from tg_tinker.wire.methods import method_of
from tg_tinker.wire.operations import FutureState, future_from_proto, get_future_request
from tg_tinker.wire.runs import config_to_json
from tg_tinker.wire.status import STATUS_KEY, error_from_status


class RawClient:
    """One key on one channel; raises the domain error that a status stands for."""

    def __init__(self, address: str, key: str | None) -> None:
        self.channel = grpc.insecure_channel(address)
        self.metadata = [("authorization", f"Bearer {key}")] if key else []

    def send(self, request: Message, payload: bytes | None = None, timeout_s: float = 60.0) -> Any:
        method = method_of(type(request))
        data = request.SerializeToString() if payload is None else payload
        try:
            if method.server_streaming:
                stream = self.channel.unary_stream(method.path)(data, metadata=self.metadata, timeout=timeout_s)
                return [method.reply.FromString(piece) for piece in stream]
            raw = self.channel.unary_unary(method.path)(data, metadata=self.metadata, timeout=timeout_s)
        except grpc.RpcError as e:
            raise as_error(e) from e
        return method.reply.FromString(raw)

    def create(self, config: TrainingConfig, request_id: str = "") -> runs_pb2.RunInfo:
        return self.send(
            runs_pb2.CreateTrainingClientRequest(request_id=request_id, config_json=config_to_json(config))
        )

    def call(self, run_id: str, seq: int, call: Call) -> FutureState:
        self.send(call_to_proto(call, Position(run_id=run_id, seq=seq)))
        return self.wait(run_id, seq)

    def wait(self, run_id: str, seq: int) -> FutureState:
        for _ in range(10):
            state = future_from_proto(self.send(get_future_request(Position(run_id=run_id, seq=seq), wait_s=10)))
            if state.status not in ("pending", "running"):
                return state
        raise AssertionError("the operation did not end")


def as_error(error: grpc.RpcError) -> TGTinkerError:
    for key, value in error.trailing_metadata() or ():
        if key == STATUS_KEY:
            return error_from_status(status_pb2.Status.FromString(value))
    raise AssertionError(f"a status without our details: {error.code()} {error.details()}")


def batch(seed: int = 0, records: int = 4, tokens: int = 12, vocab: int = 200, train: bool = True) -> Pass:
    ids = np.random.default_rng(seed).integers(1, vocab, (records, tokens))
    return Pass(batch=BatchData(input_ids=ids), train=train)

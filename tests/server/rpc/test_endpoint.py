"""The door: garbage is the caller's error, retries are answered once, ids and scopes are checked."""

from __future__ import annotations

import random
from dataclasses import replace

import grpc
import pytest

from tests.server.rpc.raw_client import RawClient, as_error, batch
from tg_tinker.errors import InvalidRequestError, TGTinkerError
from tg_tinker.proto.v1 import runs_pb2
from tg_tinker.types import DPConfig, TrainingConfig
from tg_tinker.wire.call_messages import call_to_proto
from tg_tinker.wire.calls import Pass, Position, Step
from tg_tinker.wire.methods import Method, methods
from tg_tinker.wire.operations import UNKNOWN, cancel_future_request, future_from_proto, get_future_request
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.rpc.server import bind, require_scope

CONFIG = TrainingConfig(model_ref="bigram", batch_size=4, seed=1)


def test_ten_thousand_random_bodies_never_look_like_a_fault_of_the_server(bigram_server: EmbeddedServer) -> None:
    client = RawClient(bigram_server.address, bigram_server.mint_key("tenant-a", ("trainer", "exporter", "auditor")))
    rng = random.Random(5)
    seen: dict[grpc.StatusCode, int] = {}
    calls = [client.channel.unary_unary(m.path) for m in methods() if not m.server_streaming]
    for _ in range(10_000):
        call = calls[rng.randrange(len(calls))]
        body = rng.randbytes(rng.randrange(40))
        if rng.random() < 0.5:  # a valid message with fields of the wrong meaning
            body = b"\x0a" + bytes([len(body)]) + body
        try:
            call(body, metadata=client.metadata, timeout=20)
            code = grpc.StatusCode.OK
        except grpc.RpcError as e:
            code = e.code()
            as_error(e)  # raises unless the refusal carries our details
        seen[code] = seen.get(code, 0) + 1
    assert grpc.StatusCode.INTERNAL not in seen
    assert grpc.StatusCode.UNKNOWN not in seen
    assert seen[grpc.StatusCode.INVALID_ARGUMENT] > 1000


def test_the_server_does_not_start_with_a_method_that_says_no_scope_or_has_no_servicer() -> None:
    forgotten = replace(methods()[0], scope="UNSPECIFIED")
    with pytest.raises(RuntimeError, match="scope"):
        require_scope(forgotten)
    with pytest.raises(RuntimeError, match="no servicer"):
        bind([], endpoint=None)  # type: ignore[arg-type]


def test_every_method_of_the_protocol_says_who_may_call_it() -> None:
    def scope(method: Method) -> str:
        require_scope(method)
        return method.scope

    assert {scope(m) for m in methods()} <= {"READ", "TRAIN", "SAMPLE", "EXPORT", "AUDIT", "BUDGET"}


def test_a_replayed_step_is_answered_with_the_first_result_and_executed_once(bigram_server: EmbeddedServer) -> None:
    client = RawClient(bigram_server.address, bigram_server.mint_key("tenant-a"))
    dp = DPConfig(dataset_id="d", target_epsilon=100.0)
    run = client.create(CONFIG.model_copy(update={"dp_config": dp}))
    client.call(run.run_id, 1, batch())
    request = call_to_proto(Step(), Position(run_id=run.run_id, seq=2))
    payload = request.SerializeToString()
    for _ in range(50):
        client.send(request, payload)
    first = client.wait(run.run_id, 2)
    for _ in range(50):
        client.send(request, payload)
        assert client.wait(run.run_id, 2).result == first.result
    assert client.send(runs_pb2.GetTrainingClientRequest(run_id=run.run_id)).step == 1
    with pytest.raises(InvalidRequestError) as caught:
        client.send(call_to_proto(Step(apply_dp_noise=False), Position(run_id=run.run_id, seq=2)))
    assert caught.value.field == "seq"


def test_a_replayed_create_gives_the_same_run(bigram_server: EmbeddedServer) -> None:
    client = RawClient(bigram_server.address, bigram_server.mint_key("tenant-a"))
    ids = {client.create(CONFIG, request_id="create-1").run_id for _ in range(5)}
    assert len(ids) == 1
    assert client.create(CONFIG, request_id="create-2").run_id not in ids


def test_an_operation_that_never_arrived_is_unknown_and_a_gap_waits(bigram_server: EmbeddedServer) -> None:
    client = RawClient(bigram_server.address, bigram_server.mint_key("tenant-a"))
    run = client.create(CONFIG)
    client.send(call_to_proto(Step(), Position(run_id=run.run_id, seq=2)))
    asked = get_future_request(Position(run_id=run.run_id, seq=1), wait_s=0)
    assert future_from_proto(client.send(asked)).status == UNKNOWN
    waiting = get_future_request(Position(run_id=run.run_id, seq=2), wait_s=0.05)
    assert future_from_proto(client.send(waiting)).status == "pending"
    assert client.send(cancel_future_request(f"{run.run_id}.2")).cancelled
    assert client.call(run.run_id, 1, batch()).status == "completed"
    assert client.wait(run.run_id, 2).status == "cancelled"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"input_ids": [[1, 2], [3, 999_999]]}, "batch.input_ids"),
        ({"input_ids": [[1, -2], [3, 4]]}, "batch.input_ids"),
        ({"input_ids": [[]]}, "batch.input_ids"),
        ({"input_ids": [[7] * 3000]}, "batch.input_ids"),
        ({"input_ids": [[1, 2]], "labels": [[1, 999_999]]}, "batch.labels"),
    ],
)
def test_a_bad_batch_is_refused_with_its_field_and_the_session_goes_on(
    bigram_server: EmbeddedServer, change: dict[str, object], field: str
) -> None:
    from tg_tinker.types import BatchData

    client = RawClient(bigram_server.address, bigram_server.mint_key("tenant-a"))
    run = client.create(CONFIG)
    refused = client.call(run.run_id, 1, Pass(batch=BatchData(**change)))
    assert isinstance(refused.error, InvalidRequestError)
    assert (refused.error.field, bool(refused.error.constraint)) == (field, True)
    stepped = client.call(run.run_id, 2, Step())
    assert isinstance(stepped.error, InvalidRequestError)  # never a part of a batch
    assert client.call(run.run_id, 3, batch()).status == "completed"
    assert client.call(run.run_id, 4, Step()).status == "completed"


def test_every_refusal_carries_the_id_of_its_request(bigram_server: EmbeddedServer) -> None:
    client = RawClient(bigram_server.address, bigram_server.mint_key("tenant-a"))
    client.metadata.append(("x-request-id", "my-request-7"))
    with pytest.raises(TGTinkerError) as caught:
        client.send(runs_pb2.GetTrainingClientRequest(run_id="nope"))
    assert caught.value.request_id == "my-request-7"

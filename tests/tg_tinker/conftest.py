"""A small server for the client's tests: real gRPC on a real socket, arithmetic for a model, faults on demand.

A run's weight is one number. A pass adds the sum of its token ids to the pending gradient; a step halves the
weight and adds the pending gradient. That makes order, loss and repetition visible in the result.
"""

import base64
import json
import threading
import time
from concurrent import futures
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import grpc
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import settings

from tg_tinker import ServiceClient
from tg_tinker.errors import (
    AuthenticationError,
    FutureCancelledError,
    InvalidRequestError,
    ResourceNotFoundError,
    ServerError,
    TGTinkerError,
)
from tg_tinker.ledger import AUDIT_DOMAIN, LEDGER_DOMAIN, START, ChainEntry
from tg_tinker.proto.v1 import artifacts_pb2, privacy_pb2, runs_pb2, sampling_pb2
from tg_tinker.transparency.merkle import EMPTY_ROOT
from tg_tinker.transparency.note import Checkpoint, VerifierKey, sign_note
from tg_tinker.types import (
    AdapterWeights,
    ArtifactInfo,
    Capabilities,
    EncryptionInfo,
    ForwardBackwardOutput,
    LoadStateResult,
    OptimStepOutput,
    Sample,
    SampleResult,
    SavedState,
    StreamChunk,
)
from tg_tinker.types.info import ModelInfo
from tg_tinker.types.log import LogState
from tg_tinker.types.run import PrivacyState, RunInfo
from tg_tinker.wire.artifacts import artifact_to_proto
from tg_tinker.wire.call_messages import call_from_proto, position_from_proto
from tg_tinker.wire.calls import OPERATION, Load, Pass, Position, Save, Step, Updates
from tg_tinker.wire.federation import weights_to_proto
from tg_tinker.wire.log import checkpoint_to_proto
from tg_tinker.wire.methods import methods
from tg_tinker.wire.operations import (
    ENDED,
    FutureState,
    Submission,
    asked_for,
    future_to_proto,
    submission_to_proto,
)
from tg_tinker.wire.results import chunk_to_proto
from tg_tinker.wire.runs import API_VERSION, capabilities_to_proto, config_from_json, run_info_to_proto
from tg_tinker.wire.status import STATUS_KEY, error_to_status, grpc_code

settings.register_profile("shared machine", deadline=None)  # time says more about the neighbours than about us
settings.load_profile("shared machine")
KEY = "tgk_test_key"
LOG_KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
DROP_REPLY = "drop the reply"


@dataclass
class Operation:
    """One received call."""

    payload: bytes
    call: object
    state: FutureState
    cancel: bool = False


@dataclass
class Run:
    """What survives a restart is in ``disk``; the rest is the process."""

    config_json: str
    disk: dict = field(default_factory=lambda: {"weight": 0.0, "step": 0, "seq": 0, "results": {}})
    weight: float = 0.0
    step: int = 0
    pending: list = field(default_factory=list)
    operations: dict = field(default_factory=dict)
    skipped: set = field(default_factory=set)
    expected: int = 1
    poison: str = ""
    completed: bool = False

    def restore(self):
        self.weight, self.step, self.expected = self.disk["weight"], self.disk["step"], self.disk["seq"] + 1
        self.pending, self.operations, self.skipped, self.poison = [], {}, set(), ""


class ScriptedServer:
    """Executes calls like the real server does; ``faults[method]`` is a list of things to go wrong, in order.

    A fault is an error to answer with before anything happened, DROP_REPLY (do it, answer UNAVAILABLE), or a
    number of seconds to wait first.
    """

    def __init__(self):
        self.runs, self.artifacts, self.by_request = {}, {}, {}
        self.faults, self.requests = {}, []
        self.executed = []  # (run, seq, operation) each time work is done
        self.gate = threading.Event()  # closed: nothing is executed
        self.gate.set()
        self.api_version = API_VERSION
        self.metadata_seen = []
        self.changed = threading.Condition()
        self.generation = 0
        self.port = 0
        self.start()

    def start(self):
        self.generation += 1
        self.epoch = f"epoch-{self.generation}"
        for run in self.runs.values():
            run.restore()
        self.server = grpc.server(futures.ThreadPoolExecutor(48), options=[("grpc.so_reuseport", 0)])
        tables = {}
        for method in methods():
            make = (
                grpc.unary_stream_rpc_method_handler
                if method.server_streaming
                else grpc.unary_unary_rpc_method_handler
            )
            wrap = self._streaming if method.server_streaming else self._unary
            tables.setdefault(method.service, {})[method.name] = make(
                wrap(method), method.request.FromString, lambda m: m.SerializeToString()
            )
        self.server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(name, table) for name, table in tables.items()]
        )
        self.port = self.server.add_insecure_port(f"127.0.0.1:{self.port}")
        self.server.start()
        self.worker = threading.Thread(target=self._work, args=(self.generation,), daemon=True)
        self.worker.start()

    def stop(self):
        self.generation += 0.5  # ends the worker
        with self.changed:
            self.changed.notify_all()
        self.server.stop(0).wait()

    def restart(self):
        self.stop()
        self.generation = int(self.generation)
        self.start()

    def seen(self, name):
        return [request for method, request in list(self.requests) if method == name]

    def _admit(self, method, request, context):
        metadata = dict(context.invocation_metadata())
        self.metadata_seen.append(metadata)
        self.requests.append((method.name, request))
        fault = self.faults[method.name].pop(0) if self.faults.get(method.name) else None
        if isinstance(fault, TGTinkerError):
            self._abort(context, fault)
        if isinstance(fault, grpc.StatusCode):
            context.abort(fault, "scripted")
        if isinstance(fault, int | float):
            time.sleep(fault)
        if metadata.get("authorization") != f"Bearer {KEY}":
            self._abort(context, AuthenticationError("unknown key"))
        return fault

    def _abort(self, context, error):
        context.set_trailing_metadata(((STATUS_KEY, error_to_status(error).SerializeToString()),))
        context.abort(grpc_code(error), error.message)

    def _unary(self, method):
        def handle(request, context):
            fault = self._admit(method, request, context)
            try:
                reply = getattr(self, method.name, self._submit)(request)
            except TGTinkerError as e:
                self._abort(context, e)
            if fault == DROP_REPLY:
                context.abort(grpc.StatusCode.UNAVAILABLE, "the reply was dropped")
            return reply

        return handle

    def _streaming(self, method):
        def handle(request, context):
            self._admit(method, request, context)
            try:
                yield from getattr(self, method.name)(request)
            except TGTinkerError as e:
                self._abort(context, e)

        return handle

    def _run(self, run_id):
        if run_id not in self.runs:
            raise ResourceNotFoundError("no such run", resource_type="training_client", resource_id=run_id)
        return self.runs[run_id]

    # Runs.

    def GetCapabilities(self, request):  # noqa: N802
        return capabilities_to_proto(
            Capabilities(
                server_version="9.9",
                api_version=self.api_version,
                models=[ModelInfo(name="sum", family="arithmetic", parameters=1, max_sequence_length=8)],
                max_batch_records=8,
                max_request_bytes=2**20,
                losses=[],
                optimizers=[],
                lr_schedulers=[],
                reducers=[],
                dp_sampling_modes=[],
                dp_accountants=[],
                tenant_id="clinic",
            )
        )

    def CreateTrainingClient(self, request):  # noqa: N802
        if request.request_id not in self.by_request:
            run_id = f"run_{len(self.runs) + 1}"
            self.by_request[request.request_id] = run_id
            self.runs[run_id] = Run(config_json=request.config_json)
            if request.checkpoint_id:
                weight, step, _ = self.artifacts[request.checkpoint_id]
                self.runs[run_id].disk.update(weight=weight, step=step)
            self.runs[run_id].restore()
        return self._info(self.by_request[request.request_id])

    def GetTrainingClient(self, request):  # noqa: N802
        return self._info(request.run_id)

    def ListTrainingClients(self, request):  # noqa: N802
        infos = [self._info(r) for r in reversed(self.runs)]
        fitting = [i for i in infos if request.status in ("", i.status)]
        return runs_pb2.ListTrainingClientsReply(runs=fitting[: request.limit])

    def DeleteTrainingClient(self, request):  # noqa: N802
        self._run(request.run_id)
        del self.runs[request.run_id]
        return runs_pb2.DeleteTrainingClientReply()

    def UnloadModel(self, request):  # noqa: N802
        self._run(request.run_id).completed = True
        return self._info(request.run_id)

    def ResumeTrainingClient(self, request):  # noqa: N802
        run = self._run(request.run_id)
        with self.changed:
            run.skipped |= {s for s in request.finished_seqs if s >= run.expected and s not in run.operations}
            self._advance(run)
            self.changed.notify_all()
        return self._answer(run)

    def _info(self, run_id):
        run = self._run(run_id)
        config = config_from_json(run.config_json)
        privacy = None
        if config.private:
            privacy = PrivacyState(
                dataset_id="data-1",
                epsilon_spent=0.5,
                target_epsilon=8.0,
                delta=1e-5,
                noise_multiplier=1.0,
                sample_rate=1.0,
                expected_batch_size=8,
            )
        return run_info_to_proto(
            RunInfo(
                run_id=run_id,
                config=config,
                status="completed" if run.completed else "active",
                step=run.step,
                created=NOW,
                next_seq=max([run.expected - 1, *run.operations, *run.skipped, *run.disk["results"]]) + 1,
                server_epoch=self.epoch,
                privacy=privacy,
                trainable_parameters=1,
                base_dtype="float32",
                unit_key=b"k" * 32,
            )
        )

    # Ordered calls.

    def _submit(self, request):
        run, position = self._run(request.key.run_id), position_from_proto(request.key)
        payload = request.SerializeToString()
        with self.changed:
            known = run.operations.get(position.seq) or run.disk["results"].get(position.seq)
            if known is not None and known.payload != payload:
                raise InvalidRequestError("used by a different request", field="seq", constraint="one request")
            if known is None:
                if position.seq < run.expected:
                    raise ServerError("no longer kept", details={"aborted": True})
                call = call_from_proto(request)
                state = FutureState(
                    future_id=position.future_id,
                    position=replace(position, handle=""),
                    status="pending",
                    operation=OPERATION[type(call)],
                )
                run.operations[position.seq] = Operation(payload, call, state)
            self.changed.notify_all()
        return self._answer(run, position.future_id)

    def _answer(self, run, future_id=""):
        return submission_to_proto(
            Submission(
                future_id=future_id,
                server_epoch=self.epoch,
                expected_seq=run.expected,
                durable_seq=run.disk["seq"],
            )
        )

    def _advance(self, run):
        while True:
            operation = run.operations.get(run.expected) or run.disk["results"].get(run.expected)
            if run.expected not in run.skipped and (operation is None or operation.state.status not in ENDED):
                return
            run.skipped.discard(run.expected)
            run.expected += 1

    def _work(self, generation):
        while self.generation == generation:
            ready = None
            with self.changed:
                for run_id, run in self.runs.items():
                    self._advance(run)
                    operation = run.operations.get(run.expected)
                    if operation is not None and self.gate.is_set():
                        ready = (run_id, run, operation)
                        operation.state = replace(operation.state, status="running")
                        break
                else:
                    self.changed.wait(0.02)
            if ready is not None:
                self._execute(*ready, generation)

    def _execute(self, run_id, run, operation, generation):
        self.executed.append((run_id, operation.state.position.seq, operation.state.operation))
        try:
            outcome = {"status": "completed", "result": self._do(run_id, run, operation)}
        except FutureCancelledError as e:
            outcome = {"status": "cancelled", "error": e}
        except TGTinkerError as e:
            if isinstance(operation.call, Updates) or (isinstance(operation.call, Pass) and operation.call.train):
                run.poison = e.message
            outcome = {"status": "failed", "error": e}
        with self.changed:
            if self.generation != generation:
                return
            operation.state = replace(operation.state, **outcome)
            if outcome["status"] == "completed" and isinstance(operation.call, Step | Load):
                seq = operation.state.position.seq
                kept = {s: o for s, o in run.operations.items() if s <= seq and o.state.status in ENDED}
                run.disk["results"].update(kept)
                run.disk.update(weight=run.weight, step=run.step, seq=seq)
            elif outcome["status"] == "completed" and isinstance(operation.call, Save):
                run.disk["results"][operation.state.position.seq] = operation
            self._advance(run)
            self.changed.notify_all()

    def _do(self, run_id, run, operation):
        call = operation.call
        if isinstance(call, Pass):
            total = int(call.batch.input_ids.sum())
            if total < 0:
                raise InvalidRequestError("negative ids", field="batch.input_ids", constraint=">= 0")
            if call.train:
                run.pending.append(total)
            return ForwardBackwardOutput(
                run.weight + total / 1024, "", "g" if call.train else "", call.batch.num_tokens, 1.0
            )
        if isinstance(call, Updates):
            run.pending.append(float(call.vectors_UP.sum()))
            return ForwardBackwardOutput(0.0, "", "g", 0, 1.0)
        if isinstance(call, Step):
            run.poison = run.poison or call.incomplete
            pending, run.pending = run.pending, []
            poison, run.poison = run.poison, ""
            if poison or not pending:
                raise InvalidRequestError(poison or "nothing accumulated", field="optim_step", constraint="a pass")
            run.weight, run.step = run.weight / 2 + sum(pending), run.step + 1
            return OptimStepOutput(run.weight, 0.1, run.step, None, 1.0)
        if isinstance(call, Save):
            artifact_id = f"ckpt_{len(self.artifacts) + 1}"
            self.artifacts[artifact_id] = (run.weight, run.step, dict(call.metadata))
            return SavedState(
                artifact_id, 3, EncryptionInfo("AES-256-GCM", "k"), dict(call.metadata), NOW, f"tg://{call.name}"
            )
        if isinstance(call, Load):
            if call.artifact_id not in self.artifacts:
                raise ResourceNotFoundError("no", resource_type="artifact", resource_id=call.artifact_id)
            run.weight, run.step, metadata = self.artifacts[call.artifact_id]
            run.pending = []
            return LoadStateResult(call.artifact_id, run.step, metadata, NOW)
        samples = [
            Sample(p, f"{run.weight}", 1, "length", 1.0) for p in call.prompts for _ in range(call.num_completions)
        ]
        return SampleResult(samples, len(samples), 1.0)

    def GetFuture(self, request):  # noqa: N802
        run, seq, epoch = *self._locate(request), self.epoch
        deadline = time.monotonic() + request.wait_s
        with self.changed:
            while True:
                operation = run.operations.get(seq) or run.disk["results"].get(seq)
                wait = deadline - time.monotonic()
                stopped = self.epoch != epoch or self.generation != int(self.generation)
                if operation is None or operation.state.status in ENDED or wait <= 0 or stopped:
                    break
                self.changed.wait(min(wait, 0.2))
            if stopped:
                raise ServerError("going down", details={"retry": True})
            if operation is None and seq < run.expected:
                raise ResourceNotFoundError("no longer kept", resource_type="future", resource_id=str(seq))
            state = (
                operation.state
                if operation
                else FutureState(future_id="", position=Position(run_id="", seq=seq), status="unknown")
            )
            state = replace(state, server_epoch=self.epoch, expected_seq=run.expected, durable_seq=run.disk["seq"])
        return future_to_proto(state)

    def CancelFuture(self, request):  # noqa: N802
        run, seq = self._locate(request)
        with self.changed:
            operation = run.operations.get(seq)
            cancelled = operation is not None and operation.state.status == "pending"
            if cancelled:
                error = FutureCancelledError("cancelled", future_id=operation.state.future_id)
                operation.state = replace(operation.state, status="cancelled", error=error)
            self.changed.notify_all()
        return runs_pb2.CancelFutureReply(cancelled=cancelled)

    def _locate(self, request):
        asked = asked_for(request.key)
        if isinstance(asked, Position):
            return self._run(asked.run_id), asked.seq
        run_id, _, seq = asked.rpartition(".")
        return self._run(run_id), int(seq)

    # The rest.

    def Encode(self, request):  # noqa: N802
        ids = [sampling_pb2.TokenIds(ids=list(t.encode())) for t in request.texts]
        return sampling_pb2.EncodeReply(ids=ids)

    def Decode(self, request):  # noqa: N802
        return sampling_pb2.DecodeReply(texts=[bytes(i.ids).decode() for i in request.ids])

    def SampleStream(self, request):  # noqa: N802
        for i, letter in enumerate("abc"):
            yield chunk_to_proto(StreamChunk(letter, i, [i], "length" if letter == "c" else None))
            self.gate.wait(10)

    def PullArtifact(self, request):  # noqa: N802
        if request.artifact_id not in self.artifacts:
            raise ResourceNotFoundError("no", resource_type="artifact", resource_id=request.artifact_id)
        for _ in range(3):
            yield artifacts_pb2.ArtifactChunk(data=b"\x00\x01\x02")

    def PullWeights(self, request):  # noqa: N802
        run = self._run(request.run_id)
        yield from weights_to_proto(AdapterWeights(tensors={"w": np.float32([run.weight])}, step=run.step))

    def ListArtifacts(self, request):  # noqa: N802
        infos = [
            artifact_to_proto(
                ArtifactInfo(
                    artifact_id=a,
                    training_client_id="run_1",
                    step=step,
                    size_bytes=9,
                    content_hash="sha256:0",
                    algorithm="AES-256-GCM",
                    key_id="k",
                    timestamp=NOW,
                )
            )
            for a, (_, step, _) in self.artifacts.items()
        ]
        return artifacts_pb2.ListArtifactsReply(artifacts=infos)

    def DeleteArtifact(self, request):  # noqa: N802
        del self.artifacts[request.artifact_id]
        return artifacts_pb2.DeleteArtifactReply()

    def ForecastPrivacy(self, request):  # noqa: N802
        return privacy_pb2.ForecastPrivacyReply(
            epsilon_now=1.0,
            epsilon_after=1.0 + request.steps,
            steps_remaining=7 if request.run_id == "run_1" else -1,
            delta=1e-5,
            ledger_head=b"\xab",
        )

    def GetLedger(self, request):  # noqa: N802
        terms = {"unit": "datum", "target_epsilon": "8.0", "target_delta": "1e-05"}
        event = {"kind": "gaussian", "noise_multiplier": "1.0"}
        more = {"neighbours": "add-or-remove-one", "run_id": "run_1", "time": NOW.isoformat(), "mechanism": event}
        body = {"kind": "open", "dataset_id": request.dataset_id, **terms, **more}
        entry = ChainEntry.make(LEDGER_DOMAIN, body, position=0, prev_hash=START)
        return privacy_pb2.GetLedgerReply(
            dataset_id=request.dataset_id,
            entries_json=[entry.to_json()],
            epsilon_spent=1.5,
            target_epsilon=8.0,
            delta=1e-5,
        )

    def GetPrivacyReport(self, request):  # noqa: N802
        payload = base64.b64encode(json.dumps({"dataset_id": request.dataset_id}).encode()).decode()
        return privacy_pb2.GetPrivacyReportReply(report_json=json.dumps({"payload": payload}))

    def GetCheckpoint(self, request):  # noqa: N802
        key = VerifierKey.of(LOG_KEY.public_key().public_bytes_raw())
        note = sign_note(Checkpoint(key.name, 0, EMPTY_ROOT).body(), key, LOG_KEY.sign)
        return checkpoint_to_proto([LogState(checkpoint=note, verifier_key=key.text, known_size=0)])

    def GetAuditLog(self, request):  # noqa: N802
        body = {
            "operation": request.operation or "optim_step",
            "training_client_id": request.run_id,
            "request_hash": "hmac-sha256:00",
            "request_bytes": 9,
            "artifact_ids": ["ckpt_1"],
            "started": NOW.isoformat(),
            "completed": NOW.isoformat(),
            "success": True,
            "error_code": "",
            "dp_metrics": None,
        }
        entry = ChainEntry.make(AUDIT_DOMAIN, body, position=0, prev_hash=START)
        return privacy_pb2.GetAuditLogReply(entries_json=[entry.to_json()])


@pytest.fixture
def server(monkeypatch):
    for name in ("TENANT_ID", "TIMEOUT", "RETRY_COUNT"):
        monkeypatch.delenv(f"TG_TINKER_{name}", raising=False)
    double = ScriptedServer()
    monkeypatch.setenv("TG_TINKER_BASE_URL", f"127.0.0.1:{double.port}")
    monkeypatch.setenv("TG_TINKER_API_KEY", KEY)
    yield double
    double.gate.set()
    double.stop()


@pytest.fixture
def service(server):
    with ServiceClient() as client:
        yield client
        server.gate.set()

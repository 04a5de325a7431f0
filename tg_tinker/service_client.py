"""ServiceClient: the way in. Creates and finds training clients, artifacts, ledgers, audit logs."""

from __future__ import annotations

import threading
import time
import uuid
import weakref
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy.typing as npt

from tg_tinker import datasets
from tg_tinker._endpoint import DEFAULT_RETRY_COUNT, DEFAULT_TIMEOUT_S, parse_base_url, read_tls_files, resolve
from tg_tinker._transport import Transport
from tg_tinker.datasets import Dataset
from tg_tinker.elsewhere import Elsewhere
from tg_tinker.errors import ResourceNotFoundError, ServerError
from tg_tinker.exports.files import (
    ExportedArtifact,
    check,
    open_archive,
    read_identities,
    trusted,
    write_export,
    write_whole,
)
from tg_tinker.futures import FutureHandle
from tg_tinker.ledger import PrivacyLedger
from tg_tinker.log_guard import LogGuard
from tg_tinker.session import Session
from tg_tinker.training_client import TrainingClient
from tg_tinker.transparency.pins import Pins
from tg_tinker.transparency.receipts import Receipts
from tg_tinker.transparency.watch import Watch
from tg_tinker.types import (
    ArtifactInfo,
    AuditLogEntry,
    Capabilities,
    LoRAConfig,
    ServiceConfig,
    TrainingClientInfo,
    TrainingConfig,
    WeightsSource,
)
from tg_tinker.types.federation import check_note
from tg_tinker.types.records import Budget
from tg_tinker.types.run import RunInfo
from tg_tinker.wire import federation, requests
from tg_tinker.wire.artifacts import artifact_from_proto
from tg_tinker.wire.operations import (
    UNKNOWN,
    future_from_proto,
    get_future_request,
)
from tg_tinker.wire.privacy import audit_from_lines, ledger_from_proto, report_of
from tg_tinker.wire.runs import API_VERSION, capabilities_from_proto, run_info_from_proto


class ServiceClient:
    """A connection to one server, shared by threads. Nothing is sent before the first call.

    >>> service = ServiceClient(base_url="localhost:50051")
    >>> service.config.tls
    False
    """

    def __init__(
        self,
        api_key: str | None = None,
        base_url: str | None = None,
        tenant_id: str | None = None,
        timeout: float = DEFAULT_TIMEOUT_S,
        retry_count: int = DEFAULT_RETRY_COUNT,
        *,
        user_metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Settings that are not given come from the environment.

        Args:
            api_key: or TG_TINKER_API_KEY.
            base_url: or TG_TINKER_BASE_URL; host:port (this machine), grpc://, grpcs://, http:// or https://.
                Default localhost:50051.
            tenant_id: or TG_TINKER_TENANT_ID; checked against the key's tenant.
            timeout: or TG_TINKER_TIMEOUT; seconds that a server reached before may be away, and that creating a
                run may take. Waiting for results has its own timeouts.
            retry_count: or TG_TINKER_RETRY_COUNT; repeats when the server was never reached or says "too many
                requests". 0 repeats nothing.
            user_metadata: added to the metadata of every run created here.

        Raises:
            InvalidRequestError: a setting that cannot be, named; among them plaintext to another machine.
        """
        self._config = resolve(
            api_key=api_key, base_url=base_url, tenant_id=tenant_id, timeout=timeout, retry_count=retry_count
        )
        self._transport = Transport(self._config, tls=read_tls_files() if self._config.tls else None)
        self._user_metadata = dict(user_metadata or {})
        self._lock = threading.Lock()
        self._sessions: weakref.WeakValueDictionary[str, Session] = weakref.WeakValueDictionary()
        self._capabilities: Capabilities | None = None
        self._guard: LogGuard | None = None

    @property
    def config(self) -> ServiceConfig:
        """The settings in use; the key is not shown."""
        return self._config

    @property
    def tenant_id(self) -> str:
        """The tenant that the key belongs to."""
        return self._config.tenant_id or self._handshake().tenant_id

    # Training clients.

    def create_training_client(self, config: TrainingConfig, checkpoint_id: str | None = None) -> TrainingClient:
        """Create a run.

        Args:
            checkpoint_id: start from this artifact.

        Raises:
            InvalidRequestError: the server cannot do what the configuration asks for; it names the field.
            DPBudgetExceededError: the dataset's budget does not allow a single step.
        """
        self._handshake()
        if self._user_metadata:
            config = config.model_copy(update={"metadata": {**self._user_metadata, **config.metadata}})
        request = requests.create_run(uuid.uuid4().hex, config, checkpoint_id)
        info = run_info_from_proto(self._transport.call(request, attempt_s=self._config.timeout))
        return self._client(info, takeover=False)

    def get_training_client(self, client_id: str) -> TrainingClient:
        """A handle on a run that exists, to go on where it stands. One handle drives a run at a time."""
        self._handshake()
        return self._client(self._run_info(client_id), takeover=True)

    def list_training_clients(self, status: str | None = None, limit: int = 100) -> list[TrainingClientInfo]:
        """The newest runs of the tenant; ``status`` is active, completed or failed."""
        reply = self._transport.call(requests.list_runs(status, limit))
        infos = [run_info_from_proto(run) for run in reply.runs]
        return [
            TrainingClientInfo(
                training_client_id=i.run_id,
                model_ref=i.config.model_ref,
                status=i.status,
                step=i.step,
                created=i.created,
                metadata=dict(i.config.metadata),
            )
            for i in infos
        ]

    def delete_training_client(self, training_client_id: str) -> None:
        """Delete a run and its results. Its checkpoints stay, and so does what it spent."""
        self._transport.call(requests.delete_run(training_client_id), attempt_s=self._config.timeout)

    def get_future(self, future_id: str) -> FutureHandle:
        """The handle of an operation, by its id, from any process.

        Raises:
            ResourceNotFoundError: there is none for this tenant.
        """
        state = future_from_proto(self._transport.call(get_future_request(future_id, wait_s=0.0)))
        if state.status == UNKNOWN:
            raise ResourceNotFoundError(f"no such future {future_id}", resource_type="future", resource_id=future_id)
        return FutureHandle(Elsewhere(self._transport).operation(state))

    # Artifacts.

    def pull_artifact(self, artifact_id: str, destination: str | Path | None = None) -> bytes:
        """The encrypted bytes of a checkpoint.

        Args:
            destination: also write them to this file; it appears whole or not at all.
        """
        stream = self._transport.stream(requests.pull_artifact(artifact_id))
        data = b"".join(chunk.data for chunk in stream)
        if destination is not None:
            write_whole(Path(destination), [data])
        return data

    def list_artifacts(self, training_client_id: str | None = None, limit: int = 100) -> list[ArtifactInfo]:
        """The newest checkpoints, of one run or of all."""
        reply = self._transport.call(requests.list_artifacts(training_client_id, limit))
        return [artifact_from_proto(a) for a in reply.artifacts]

    def delete_artifact(self, artifact_id: str) -> None:
        """Delete a checkpoint. What it cost stays in the ledger."""
        self._transport.call(requests.delete_artifact(artifact_id))

    def export_artifact(
        self,
        artifact_id: str,
        recipients: str | Sequence[str] = (),
        destination: str | Path = "export.age",
        *,
        pq_recipients: str | Sequence[str] = (),
    ) -> ExportedArtifact:
        """Write a checkpoint to a file that its receivers open with tools of their own: weights, signed, sealed.

        The file holds what PEFT loads, a signed manifest and the privacy report; never the optimizer. The server
        notes it, with its receivers, in the audit log.

        Args:
            recipients: public age keys, ``age1...``; ``age -d`` opens the file.
            destination: appears whole or not at all; replaced if it is there.
            pq_recipients: instead, post-quantum ones (``tg-tinker checkpoints keygen --pq``).

        Raises:
            ResourceNotFoundError: there is no such checkpoint of this tenant.
            AuthorizationError: the key's roles do not allow exports.
        """
        named = [[r] if isinstance(r, str) else list(r) for r in (recipients, pq_recipients)]
        stream = self._transport.stream(requests.export_artifact(artifact_id, *named))
        return write_export(Path(destination), (chunk.data for chunk in stream))

    def import_artifact(
        self,
        path: str | Path,
        *,
        signer: str | None = None,
        identity: str | Path | Sequence[str] = (),
    ) -> ArtifactInfo:
        """Take an export in as a checkpoint of this tenant; it keeps where it came from and what that promised.

        It is opened and checked here first: a private key never leaves this machine.

        Args:
            path: of an export, sealed or opened, or of the folder it was unpacked into.
            signer: verifier key of who exported it. Without one, it must be a log that clients here met before.
            identity: file with the receiver's private key, or the keys themselves, where it is sealed.

        Raises:
            LogVerificationError: not signed by ``signer``.
            InvalidRequestError: altered, not an export, or of an unknown signer.
        """
        keys = list(identity) if isinstance(identity, list | tuple) else read_identities(Path(str(identity)))
        checked = check(Path(path), trusted(signer), keys)
        with open_archive(Path(path), keys) as archive:
            reply = self._transport.upload(requests.import_artifact(checked.key.text, map(bytes, archive)))
        return artifact_from_proto(reply.artifact)

    def import_weights(
        self,
        tensors: Mapping[str, npt.NDArray[Any]],
        *,
        base_model: str,
        lora_config: LoRAConfig | None,
        step: int = 0,
        source: WeightsSource,
    ) -> ArtifactInfo:
        """Make an encrypted checkpoint of plain weights, e.g. of an average; ``load_state`` takes it like any other.

        It is sent once: after a lost connection, call again and delete the checkpoint that the first call may have
        made. Names and shapes are checked when it is loaded.

        Args:
            tensors: finite float32, under the names that ``pull_weights`` gives.
            lora_config: the adapter they are of; ``None`` where every parameter is trained.
            step: optimizer steps that made them.
            source: where they come from and what that promises, on your word. It stays with everything that is
                trained from them. Where nothing is promised, a run with privacy refuses to load them, unless it
                was created with ``DPConfig(initial_weights="public")``.

        Raises:
            InvalidRequestError: naming what is wrong with them. Nothing is left of them then.
        """
        stream = federation.import_weights(
            tensors, base_model=base_model, lora_config=lora_config, step=step, source=source
        )
        return artifact_from_proto(self._transport.upload(stream).artifact)

    def note_federation(self, event: str, *, job: str, reason: str = "", round: int = 0) -> None:
        """Note in the audit log what became of a federated job or of a round of it, as ``federation.<event>``.

        Args:
            event: one of ``tg_tinker.types.federation.EVENTS``.
            job: digest of the job, hex.
            reason: of a refusal or a failure, one of those of ``FederationRefusedError``.
            round: 0 outside of rounds.

        Raises:
            InvalidRequestError: a value that is not of the lists: the log takes no free text.
        """
        check_note(event, job, round, reason)
        self._transport.call(federation.note(event, job, round, reason))

    # Datasets.

    def create_dataset(
        self,
        dataset_id: str,
        records: Sequence[str | Mapping[str, Any]],
        *,
        unit_ids: Sequence[str] | None = None,
        privacy_unit: str = "datum",
        target_epsilon: float | None = 8.0,
        target_delta: float | None = None,
        truncate: bool = False,
    ) -> Dataset:
        """Register records: the server keeps them encrypted, draws batches from them, and guards their budget.

        Args:
            dataset_id: a name that was never used; its budget is set here, once.
            records: texts, or dicts of token lists {input_ids, labels, attention_mask}.
            unit_ids: whose each record is, for privacy units larger than a record. They stay in this process.
            target_epsilon: the promise for all runs together; ``None``: no limit.
            target_delta: default 1 / (2 * units), rounded down to one digit.
            truncate: cut records that are longer than a run allows; otherwise such a run is refused.

        Raises:
            InvalidRequestError: the name was used before, or a record cannot be. Nothing is left of the upload.
        """
        self._handshake()
        return datasets.create(
            self._transport,
            dataset_id,
            records,
            unit_ids=unit_ids,
            privacy_unit=privacy_unit,
            target_epsilon=target_epsilon,
            target_delta=target_delta,
            truncate=truncate,
        )

    def get_dataset(self, dataset_id: str) -> Dataset:
        """A handle on a registered dataset."""
        return Dataset(self._transport, datasets.get(self._transport, dataset_id))

    def list_datasets(self, limit: int = 100) -> list[Dataset]:
        """The newest registered datasets of the tenant."""
        return datasets.listed(self._transport, limit)

    def delete_dataset(self, dataset_id: str) -> None:
        """Erase every record for good. The ledger and what was spent stay, and the name is never free again."""
        datasets.delete(self._transport, dataset_id)

    def raise_budget(self, dataset_id: str, target_epsilon: float, reason: str) -> Budget:
        """Raise the target of a dataset, registered or not. Needs a key with the role budget_officer.

        Args:
            reason: one line; stands in the ledger beside the id of the key, so name nobody.

        Raises:
            InvalidRequestError: not larger than the target in force.
        """
        return datasets.raise_budget(self._transport, dataset_id, target_epsilon, reason)

    # Privacy and audit.

    def get_privacy_ledger(self, dataset_id: str) -> PrivacyLedger:
        """The whole ledger of a dataset; ``verify()`` checks it without trusting the server.

        Raises:
            LogVerificationError: the log does not continue what was seen of it: the ledger may be an old one.
        """
        self._handshake()
        return ledger_from_proto(self._transport.call(requests.ledger(dataset_id)))

    def get_privacy_report(self, dataset_or_run: str) -> dict[str, Any]:
        """The report on a dataset, or on that of a run: guarantee, curve, coverage, mechanism, accounting, integrity.

        As the server sent it; ``get_signed_report`` is what others can check. A report adds an entry to the ledger.
        """
        return report_of(self.get_signed_report(dataset_or_run))

    def get_signed_report(self, dataset_or_run: str) -> bytes:
        """The report in its signed envelope, to hand out: ``tg-tinker audit verify`` checks it offline.

        Raises:
            LogVerificationError: the server's log does not continue what was seen of it: the report may leave out
                what was spent.
        """
        self._handshake()
        return str(self._transport.call(requests.report(dataset_or_run)).report_json).encode()

    def attach_audit(self, dataset_id: str, result: Mapping[str, Any]) -> None:
        """Note in a dataset's ledger what ``tg-tinker audit run --out FILE`` found, so that its reports say it.

        Raises:
            InvalidRequestError: ``result`` is not such a document.
        """
        self._transport.call(requests.attach_audit(dataset_id, result))

    def get_audit_logs(
        self,
        training_client_id: str | None = None,
        operation: str | None = None,
        start_time: datetime | None = None,
        end_time: datetime | None = None,
        limit: int = 100,
    ) -> list[AuditLogEntry]:
        """The newest audit records that fit, oldest of them first. Times are timezone-aware."""
        request = requests.audit_log(training_client_id, operation, start_time, end_time, limit)
        return audit_from_lines(self._transport.call(request).entries_json)

    def check_log(self) -> int:
        """Verify that the server's transparency log continues what was seen of it; the number of its entries.

        Done by itself whenever a run is created or taken up, before a ledger or a report is fetched, after every
        restart of the server, and with every paid step.

        Raises:
            LogVerificationError: it was rolled back or forked, or another log answers.
        """
        return self._guarded(self._handshake().tenant_id).known_size

    # The server.

    def get_server_capabilities(self) -> Capabilities:
        """What the server can do.

        Raises:
            ServerError: it speaks another major version of the protocol.
        """
        request = requests.capabilities(version("tg-tinker"))
        capabilities = capabilities_from_proto(self._transport.call(request))
        if capabilities.api_version.partition(".")[0] != API_VERSION.partition(".")[0]:
            raise ServerError(
                f"the server speaks protocol {capabilities.api_version} and this client {API_VERSION}: install the "
                f"version of tg-tinker that fits the server ({capabilities.server_version})",
                details={"server": capabilities.api_version, "client": API_VERSION},
            )
        self._capabilities = capabilities
        return capabilities

    def close(self, *, wait_s: float = 60.0) -> None:
        """End the connection. Calls already made are handed to the server first, for up to ``wait_s`` seconds."""
        deadline = time.monotonic() + wait_s
        for session in list(self._sessions.values()):
            session.close(wait_s=max(0.0, deadline - time.monotonic()))
        if self._guard is not None:
            self._guard.close()
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(wait_s=60.0 if error is None else 0.0)

    def _handshake(self) -> Capabilities:
        """Who the server is, and that its log continues what was seen of it."""
        capabilities = self._capabilities or self.get_server_capabilities()
        self._guarded(capabilities.tenant_id).check()
        return capabilities

    def _guarded(self, tenant: str) -> LogGuard:
        with self._lock:
            if self._guard is None:
                endpoint = parse_base_url(self._config.base_url)
                watch = Watch(
                    Pins.of_user(),
                    address=endpoint.target,
                    tenant=tenant,
                    loopback=endpoint.loopback,
                    receipts=Receipts.of_user(),
                )
                self._guard = LogGuard(self._transport, watch)
            return self._guard

    def _run_info(self, run_id: str) -> RunInfo:
        request = requests.get_run(run_id)
        return run_info_from_proto(self._transport.call(request, attempt_s=self._config.timeout))

    def _client(self, info: RunInfo, *, takeover: bool) -> TrainingClient:
        assert self._guard is not None  # by the handshake
        with self._lock:
            session = self._sessions.get(info.run_id)
            if session is None or not session.usable or info.next_seq > session.next_seq:
                session = Session(self._transport, self._guard, info, takeover=takeover)
                self._sessions[info.run_id] = session
        return TrainingClient(self._transport, session, info)

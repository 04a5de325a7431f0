"""Takes a checkpoint out of the server: packed, signed, sealed for its receivers, noted, then handed over."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker.exports import age, hpke
from tg_tinker.exports.pieces import read_file
from tg_tinker.exports.tar import LARGEST_MEMBER_BYTES, ORDER, REPORT, REPORT_PAGE, Bytes, write_tar
from tg_tinker.reports.page import render
from tg_tinker.wire.privacy import report_of
from tg_tinker_server.artifacts.package import Source, documents
from tg_tinker_server.artifacts.tensors import FormatError, state_from
from tg_tinker_server.artifacts.vault import Vault
from tg_tinker_server.artifacts.weights import TensorFile, take_weights
from tg_tinker_server.crypto.signing import TenantSigner
from tg_tinker_server.ledger.audit import AuditLog, AuditRecord
from tg_tinker_server.service.caller import Caller
from tg_tinker_server.service.checkpoints import CheckpointService
from tg_tinker_server.service.durability import CHECKPOINT, now
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.service.lineage import is_foreign
from tg_tinker_server.store.artifact_rows import ArtifactRow

OPERATION = "export_artifact"
MOST_AT_ONCE = 2
Reporter = Callable[[str, str], Awaitable[bytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealing:
    """For whom an export is: age recipients, or post-quantum ones. Born checked.

    Raises:
        InvalidRequestError: none, both kinds, or one that is no public key.
    """

    recipients: tuple[str, ...]
    pq_recipients: tuple[str, ...]

    def __post_init__(self) -> None:
        if bool(self.recipients) == bool(self.pq_recipients):
            raise InvalidRequestError(
                "name recipients (age1...) or post-quantum recipients, one kind in one export",
                field="recipients",
                constraint="one kind",
            )
        if self.recipients:
            age.check_recipients(self.recipients)
        else:
            hpke.check_recipients(self.pq_recipients)

    @property
    def fingerprints(self) -> str:
        """What the audit log keeps of the receivers."""
        return " ".join(age.fingerprint(r) for r in (*self.recipients, *self.pq_recipients))

    def seal(self, pieces: Iterator[Bytes], sink: IO[bytes]) -> None:
        """Encrypt into ``sink``."""
        if self.recipients:
            age.seal_age(self.recipients, pieces, sink)
            return
        for piece in hpke.seal_hpke(self.pq_recipients, pieces):
            sink.write(piece)


@dataclass(frozen=True, slots=True)
class ExportService:
    """Exports of checkpoints.

    Attributes:
        scratch: folder for sealed exports on their way out; they have no name there and are gone with the process.
        reporter: the signed report on a tenant's dataset.
        places: how many may be packed at once.
        hub_ids: where a base model comes from, by its name here, if that means something elsewhere.
    """

    vault: Vault
    checkpoints: CheckpointService
    signers: TenantSigner
    audit: AuditLog
    executors: Executors
    scratch: Path
    reporter: Reporter
    hub_ids: Mapping[str, str]
    places: asyncio.Semaphore

    async def export(self, caller: Caller, artifact_id: str, sealing: Sealing) -> Iterator[bytes]:
        """The sealed export, in pieces of at most 1 MiB; iterate it off the event loop.

        Its record is in the audit log, with the receivers and its SHA-256, before the first piece is given.

        Raises:
            ResourceNotFoundError: there is no such checkpoint of this tenant.
            InvalidRequestError: it was altered, or cannot be exported.
        """
        started = now()
        row = await self.checkpoints.row(caller, artifact_id)
        artifact_id = row.artifact_id
        # Not on the threads that steps wait for, and only so many at once: each keeps a core busy.
        async with self.places:
            state, names = await asyncio.to_thread(self._inspect, row)
        report: dict[str, bytes] = {}  # where the data was never here, its own server reports on it
        if state["ledger"] is not None and not is_foreign(state):
            report = await self._report(caller.tenant, state)
        source = Source(
            artifact_id=artifact_id,
            content_hash=row.content_hash,
            state=state,
            weight_names=names,
            base_model=self.hub_ids.get(state["config"]["model_ref"], state["config"]["model_ref"]),
            report=report,
            exported=started.isoformat(),
            server_version=version("tg-tinker"),
        )
        async with self.places:
            file, digest, size = await asyncio.to_thread(self._build, row, source, sealing)
        try:
            record = AuditRecord(
                operation=OPERATION,
                run_id=row.run_id,
                request_hash="",
                request_bytes=size,
                artifact_ids=(artifact_id,),
                started=started,
                completed=now(),
                success=True,
                error_code="",
                dp_metrics=None,
                actor=caller.key_id,
                facts={"recipients": sealing.fingerprints, "digest": f"sha256:{digest}"},
            )
            await self.executors.io(self.audit.append(caller.tenant, record).result)
        except BaseException:
            file.close()
            raise
        return _closing(file)

    def _inspect(self, row: ArtifactRow) -> tuple[dict[str, Any], list[str]]:
        """State and names of weights. They are authentic; that the rest is intact is seen when it is read."""
        size, pieces = self.vault.plaintext(tenant=row.tenant, artifact_id=row.artifact_id, kind=CHECKPOINT)
        file = TensorFile.read(pieces, size)
        names = [e.name.removeprefix("weights/") for e in file.entries if e.name.startswith("weights/")]
        return state_from(file.metadata), names

    async def _report(self, tenant: str, state: Mapping[str, Any]) -> dict[str, bytes]:
        envelope = await self.reporter(tenant, str(state["ledger"]["dataset_id"]))
        return {REPORT: envelope, REPORT_PAGE: render(report_of(envelope)).encode()}

    def _build(self, row: ArtifactRow, source: Source, sealing: Sealing) -> tuple[IO[bytes], str, int]:
        digest, size = hashlib.sha256(), 0
        weights = self._weights(row)
        for piece in weights[1]:
            digest.update(piece)
            size += len(piece)
        if size > LARGEST_MEMBER_BYTES:
            raise InvalidRequestError(
                f"the weights have {size} bytes, over the {LARGEST_MEMBER_BYTES} of an export",
                field="artifact_id",
                constraint=f"at most {LARGEST_MEMBER_BYTES} bytes of weights",
            )
        files = documents(
            source, digest.hexdigest(), self.signers.signer(row.tenant), self.signers.model_signer(row.tenant)
        )
        members = [(n, len(files[n]), [files[n]]) for n in sorted(files, key=ORDER.__getitem__)]
        again, pieces = self._weights(row)
        tar = write_tar(row.artifact_id, [*members, (source.weights_name, again, pieces)])
        try:
            file = tempfile.TemporaryFile(dir=self.scratch)  # noqa: SIM115 - closed when it was read, or below
        except OSError as e:
            raise ServerError(f"the export could not be stored: {e.strerror}; check the disk and try again") from e
        try:
            sealing.seal(tar, file)
            size = file.tell()
            file.seek(0)
            sealed = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
        except OSError as e:
            file.close()
            raise ServerError(f"the export could not be stored: {e.strerror}; check the disk and try again") from e
        except BaseException:
            file.close()
            raise
        return file, sealed, size

    def _weights(self, row: ArtifactRow) -> tuple[int, Iterator[Bytes]]:
        size, pieces = self.vault.plaintext(tenant=row.tenant, artifact_id=row.artifact_id, kind=CHECKPOINT)
        try:
            weights = take_weights(pieces, size)
        except FormatError as e:
            raise ServerError("a verified checkpoint is not in the format; was it saved by a newer server?") from e
        return weights.size, weights.pieces


def _closing(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        yield from read_file(file)

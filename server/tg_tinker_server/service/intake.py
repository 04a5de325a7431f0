"""Makes checkpoints of what callers bring: sealed, then kept with its audit record, or not at all."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Generic, TypeVar

from tg_tinker.errors import TGTinkerError
from tg_tinker_server.artifacts.tensors import Bytes
from tg_tinker_server.artifacts.vault import SealedArtifact, Vault
from tg_tinker_server.ledger.audit import AuditLog, AuditRecord
from tg_tinker_server.service.caller import Caller
from tg_tinker_server.service.checkpoints import METADATA
from tg_tinker_server.service.durability import CHECKPOINT, new_id, now
from tg_tinker_server.service.lineage import IMPORTED
from tg_tinker_server.service.paths import NAME
from tg_tinker_server.service.sealed_text import SealedText
from tg_tinker_server.service.uploads import Uploads, refuse_given_up
from tg_tinker_server.store import artifact_rows
from tg_tinker_server.store.database import Database, Transaction

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened(Generic[T]):
    """What was brought, its beginning read and checked.

    Attributes:
        plaintext: of the artifact to be; what it raises means that nothing is kept.
        facts: for the audit log.
        about: for the caller.
    """

    plaintext: Iterator[Bytes]
    step: int
    facts: Mapping[str, str]
    about: T


@dataclass(frozen=True, slots=True)
class Intake:
    """Takes checkpoints in."""

    db: Database
    vault: Vault
    audit: AuditLog
    texts: SealedText
    uploads: Uploads

    async def take(
        self,
        caller: Caller,
        data: AsyncIterator[bytes],
        opening: Callable[[str, Iterator[bytes]], Opened[T]],
        *,
        operation: str,
        what: str,
        facts: Mapping[str, str],
    ) -> tuple[artifact_rows.ArtifactRow, T]:
        """Keep what arrives as a checkpoint of the caller's tenant.

        What fails, or is given up by its caller, is noted and leaves nothing behind; what is kept and its record are
        there together or not at all.

        Args:
            opening: gets the id of the artifact to be, and the pieces; reads and checks the beginning.
            what: is brought, for messages.
            facts: for the audit log, also where it fails.
        """

        caller.refuse_policy(f"import {what}")

        def work(pieces: Iterator[bytes], given_up: threading.Event) -> tuple[artifact_rows.ArtifactRow, T]:
            started, artifact_id = now(), new_id("ckpt")
            try:
                opened = opening(artifact_id, pieces)
                sealed = self.vault.seal_plain(
                    tenant=caller.tenant, artifact_id=artifact_id, kind=CHECKPOINT, plaintext=opened.plaintext
                )
                try:
                    row = self._row(caller.tenant, sealed, opened.step)
                    refuse_given_up(given_up, what)
                except BaseException:
                    self.vault.delete(tenant=caller.tenant, artifact_id=artifact_id)
                    raise
            except TGTinkerError as e:
                record = _record(operation, caller, (), started, facts, error=e.code)
                self.audit.append(caller.tenant, record).result()
                raise
            record = _record(operation, caller, (artifact_id,), started, {**facts, **opened.facts})

            def write(tx: Transaction) -> None:
                artifact_rows.insert_artifact(tx, row)
                self.audit.insert(tx, caller.tenant, record)

            # A write that failed may still be on disk: then its ciphertext is needed. If not, the next start
            # deletes it.
            self.db.write(write)
            return row, opened.about

        return await self.uploads.take(caller.tenant, data, work, what=what)

    def _row(self, tenant: str, sealed: SealedArtifact, step: int) -> artifact_rows.ArtifactRow:
        return artifact_rows.ArtifactRow(
            tenant=tenant,
            artifact_id=sealed.artifact_id,
            run_id=IMPORTED,
            kind=CHECKPOINT,
            step=step,
            size_bytes=sealed.size_bytes,
            content_hash=sealed.content_hash,
            algorithm=sealed.algorithm,
            key_id=sealed.key_id,
            name=self.texts.seal(tenant, NAME, "", sealed.artifact_id),
            created=now(),
            optimizer=False,
            metadata_json=self.texts.seal(tenant, METADATA, "{}", sealed.artifact_id),
        )


def _record(
    operation: str,
    caller: Caller,
    artifact_ids: tuple[str, ...],
    started: datetime,
    facts: Mapping[str, str],
    *,
    error: str = "",
) -> AuditRecord:
    return AuditRecord(
        operation=operation,
        run_id=IMPORTED,
        request_hash="",
        request_bytes=0,
        artifact_ids=artifact_ids,
        started=started,
        completed=now(),
        success=not error,
        error_code=error,
        dp_metrics=None,
        actor=caller.key_id,
        facts=facts,
    )

"""Checkpoints as their owners find, list, keep and delete them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from tg_tinker.errors import InvalidRequestError
from tg_tinker.wire.calls import MAX_TTL_S
from tg_tinker_server.artifacts.vault import Vault
from tg_tinker_server.engine.backend import EngineState
from tg_tinker_server.service.caller import Caller
from tg_tinker_server.service.durability import CHECKPOINT, now
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.service.paths import NAME, PURPOSES, Paths, not_found, path_of
from tg_tinker_server.service.sealed_text import SealedText
from tg_tinker_server.store import artifact_rows
from tg_tinker_server.store.database import Database, Transaction

METADATA = "artifact-metadata"


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """A checkpoint as its owner may see it.

    Attributes:
        metadata: of its writer; empty when it was over 4 KiB.
    """

    row: artifact_rows.ArtifactRow
    name: str
    path: str
    metadata: Mapping[str, Any]


Page = tuple[list[Described], int]
Rows = tuple[list[artifact_rows.ArtifactRow], int]


@dataclass(frozen=True, slots=True)
class CheckpointService:
    """Encrypted checkpoints of runs. Names are unique for a run and purpose; what has expired is missing."""

    db: Database
    vault: Vault
    executors: Executors
    texts: SealedText
    paths: Paths

    async def open(self, tenant: str, artifact_id: str) -> tuple[EngineState, Mapping[str, Any]]:
        """A tenant's checkpoint whose `row` was found, verified to its end before anything of it is used.

        Raises:
            InvalidRequestError: it was altered, or was deleted just now.
        """
        opened = await self.executors.io(self.vault.open, tenant=tenant, artifact_id=artifact_id, kind=CHECKPOINT)
        return EngineState(tensors=opened.tensors, scalars=opened.state["engine"]), opened.state

    async def row(self, caller: Caller, path_or_id: str) -> artifact_rows.ArtifactRow:
        """The index row of a checkpoint that the caller may see, by address or id.

        Raises:
            ResourceNotFoundError: there is none.
        """
        return await self.executors.io(self.paths.resolve, caller, path_or_id)

    async def describe(self, row: artifact_rows.ArtifactRow) -> Described:
        """A checkpoint with what is sealed in its row."""
        return await self.executors.io(self._described, row)

    async def list(self, caller: Caller, *, run_id: str = "", purpose: str = "", limit: int, offset: int = 0) -> Page:
        """A page of the checkpoints that the caller may see, newest first, and how many there are in all."""
        if purpose and purpose not in PURPOSES:
            raise InvalidRequestError("unknown kind of checkpoint", field="kind", constraint=", ".join(PURPOSES))
        check_page(limit, offset)
        return await self.executors.io(self._list, caller, run_id or None, purpose or None, limit, offset)

    def _list(self, caller: Caller, run_id: str | None, purpose: str | None, limit: int, offset: int) -> Page:
        at, everything = now(), caller.policy is None

        def read(tx: Transaction) -> Rows:
            rows = artifact_rows.list_artifacts(
                tx,
                caller.tenant,
                run_id=run_id,
                purpose=purpose,
                at=at,
                limit=limit if everything else None,
                offset=offset if everything else 0,
            )
            if not everything:
                return rows, 0
            return rows, artifact_rows.count_artifacts(tx, caller.tenant, run_id=run_id, purpose=purpose, at=at)

        rows, total = self.db.read(read)
        if not everything:
            admitted = {run: self.paths.visible(caller, row) for run, row in {r.run_id: r for r in rows}.items()}
            rows = [r for r in rows if admitted[r.run_id]]
            rows, total = rows[offset : offset + limit], len(rows)
        return [self._described(r) for r in rows], total

    def _described(self, row: artifact_rows.ArtifactRow) -> Described:
        name = self.texts.open(row.tenant, NAME, row.name, row.artifact_id)
        sealed = row.metadata_json
        text = "{}" if sealed is None else self.texts.open(row.tenant, METADATA, sealed, row.artifact_id)
        # A name from before names were unique is no address.
        path = path_of(row, name if row.name_mac is not None else "")
        return Described(row=row, name=name, path=path, metadata=json.loads(text))

    async def pull(self, caller: Caller, path_or_id: str) -> Iterator[bytes]:
        """The ciphertext, in pieces of at most 1 MiB; iterate it off the event loop."""
        row = await self.row(caller, path_or_id)
        return self.vault.stream(tenant=row.tenant, artifact_id=row.artifact_id)

    async def set_ttl(
        self, caller: Caller, row: artifact_rows.ArtifactRow, ttl_seconds: int | None
    ) -> artifact_rows.ArtifactRow:
        """Let a checkpoint expire so many seconds from now; ``None`` keeps it until it is deleted.

        Raises:
            ResourceNotFoundError: it is gone meanwhile.
            InvalidRequestError: no such time.
        """
        expires = expiry_after(ttl_seconds)

        def write(tx: Transaction) -> None:
            there = artifact_rows.get_artifact(tx, row.tenant, row.artifact_id)
            if there is None or not self.paths.live(there):  # what has expired does not come back
                raise not_found(row.artifact_id)
            artifact_rows.set_expiry(tx, row.tenant, row.artifact_id, expires)

        await self.executors.io(self.db.write, write)
        return await self.row(caller, row.artifact_id)

    async def delete(self, caller: Caller, path_or_id: str) -> None:
        """Delete a checkpoint. What it cost stays in the ledger."""
        row = await self.row(caller, path_or_id)
        await self.executors.io(self.erase, row.tenant, row.artifact_id)

    def erase(self, tenant: str, artifact_id: str) -> None:
        """Delete a checkpoint: first it is missing, then its ciphertext goes. Call it off the event loop."""
        self.db.write(lambda tx: artifact_rows.mark_deleted(tx, tenant, artifact_id, now()))
        self.vault.delete(tenant=tenant, artifact_id=artifact_id)


def expiry_after(ttl_seconds: int | None) -> datetime | None:
    """When something expires that lives so many seconds from now.

    Raises:
        InvalidRequestError: no such time.
    """
    if ttl_seconds is None:
        return None
    if not 1 <= ttl_seconds <= MAX_TTL_S:
        raise InvalidRequestError(
            f"ttl_seconds={ttl_seconds} is not possible", field="ttl_seconds", constraint=f"1 to {MAX_TTL_S}"
        )
    return now() + timedelta(seconds=ttl_seconds)


def check_page(limit: int, offset: int) -> None:
    """Refuse a page that cannot be.

    Raises:
        InvalidRequestError: it cannot.
    """
    if limit < 1 or not 0 <= offset < 2**62:
        raise InvalidRequestError(
            f"limit={limit}, offset={offset}: no such page", field="offset", constraint="limit from 1, offset from 0"
        )

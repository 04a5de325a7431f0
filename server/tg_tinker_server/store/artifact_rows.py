"""Rows of encrypted checkpoints."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, insert, select, update

from tg_tinker_server.store import tables as t


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactRow:
    """One checkpoint; the ciphertext lies in the blob store under ``artifact_id``."""

    tenant: str
    artifact_id: str
    run_id: str
    kind: str
    step: int
    size_bytes: int
    content_hash: str
    algorithm: str
    key_id: str
    name: str
    created: datetime
    deleted: datetime | None = None


def insert_artifact(tx: Connection, row: ArtifactRow) -> None:
    """Add a checkpoint."""
    tx.execute(insert(t.artifacts).values(**{c.name: getattr(row, c.name) for c in t.artifacts.columns}))


def get_artifact(tx: Connection, tenant: str, artifact_id: str) -> ArtifactRow | None:
    """A tenant's checkpoint, deleted ones excepted."""
    c = t.artifacts.c
    found = tx.execute(
        select(t.artifacts).where(c.tenant == tenant, c.artifact_id == artifact_id, c.deleted.is_(None))
    ).first()
    return ArtifactRow(**found._mapping) if found else None


def list_artifacts(tx: Connection, tenant: str, *, run_id: str | None, limit: int) -> list[ArtifactRow]:
    """A tenant's checkpoints, newest first."""
    c = t.artifacts.c
    query = select(t.artifacts).where(c.tenant == tenant, c.deleted.is_(None))
    if run_id:
        query = query.where(c.run_id == run_id)
    return [ArtifactRow(**r._mapping) for r in tx.execute(query.order_by(c.created.desc()).limit(limit))]


def mark_deleted(tx: Connection, tenant: str, artifact_id: str, when: datetime) -> None:
    """Remember that a checkpoint was deleted."""
    c = t.artifacts.c
    tx.execute(update(t.artifacts).where(c.tenant == tenant, c.artifact_id == artifact_id).values(deleted=when))


def set_key_ids(tx: Connection, tenant: str, key_id: str, *, but: Collection[str]) -> None:
    """Note which version of the tenant's key wraps those of all checkpoints, but of some."""
    c = t.artifacts.c
    where = (c.tenant == tenant) & (c.key_id != key_id) & c.artifact_id.not_in(but)
    tx.execute(update(t.artifacts).where(where).values(key_id=key_id))


def live_artifact_ids(tx: Connection) -> set[str]:
    """Every checkpoint that is not deleted, of any tenant."""
    return {a for (a,) in tx.execute(select(t.artifacts.c.artifact_id).where(t.artifacts.c.deleted.is_(None)))}

"""Rows of encrypted checkpoints."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from tg_tinker_server.store import tables as t


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactRow:
    """One checkpoint; the ciphertext lies in the blob store under ``artifact_id``.

    Attributes:
        name, metadata_json: sealed.
        purpose: weights, sampler_weights or external_weights.
        name_mac: stands for the name where names are unique; ``None``: it has none.
        expires: from then on it is missing.
        optimizer: whether the optimizer's state is in it; ``None``: from before that was noted.
    """

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
    purpose: str = "weights"
    name_mac: bytes | None = None
    expires: datetime | None = None
    optimizer: bool | None = None
    metadata_json: str | None = None


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


def find_named(tx: Connection, tenant: str, run_id: str, purpose: str, name_mac: bytes) -> ArtifactRow | None:
    """The checkpoint of a name, expired ones included, deleted ones excepted."""
    c = t.artifacts.c
    where = (c.tenant == tenant) & (c.run_id == run_id) & (c.purpose == purpose) & (c.name_mac == name_mac)
    found = tx.execute(select(t.artifacts).where(where, c.deleted.is_(None))).first()
    return ArtifactRow(**found._mapping) if found else None


def list_artifacts(
    tx: Connection,
    tenant: str,
    *,
    run_id: str | None,
    purpose: str | None,
    at: datetime,
    limit: int | None,
    offset: int,
) -> list[ArtifactRow]:
    """A tenant's checkpoints as of a moment, newest first."""
    c = t.artifacts.c
    query = select(t.artifacts).where(_listed(tenant, run_id, purpose, at))
    order = (c.created.desc(), c.artifact_id)  # a total order: pages are disjoint
    return [ArtifactRow(**r._mapping) for r in tx.execute(query.order_by(*order).limit(limit).offset(offset))]


def count_artifacts(tx: Connection, tenant: str, *, run_id: str | None, purpose: str | None, at: datetime) -> int:
    """How many `list_artifacts` has."""
    where = _listed(tenant, run_id, purpose, at)
    return int(tx.execute(select(func.count()).select_from(t.artifacts).where(where)).scalar_one())


def _listed(tenant: str, run_id: str | None, purpose: str | None, at: datetime) -> Any:
    c = t.artifacts.c
    where = (c.tenant == tenant) & c.deleted.is_(None) & (c.expires.is_(None) | (c.expires > at))
    if run_id:
        where &= c.run_id == run_id
    if purpose:
        where &= c.purpose == purpose
    return where


def expired_artifacts(tx: Connection, at: datetime, *, limit: int) -> list[tuple[str, str]]:
    """Tenants and ids of checkpoints that have expired and are not deleted yet."""
    c = t.artifacts.c
    query = select(c.tenant, c.artifact_id).where(c.deleted.is_(None), c.expires <= at).limit(limit)
    return [(str(tenant), str(artifact_id)) for tenant, artifact_id in tx.execute(query)]


def set_expiry(tx: Connection, tenant: str, artifact_id: str, expires: datetime | None) -> None:
    """Say when a checkpoint expires."""
    c = t.artifacts.c
    tx.execute(update(t.artifacts).where(c.tenant == tenant, c.artifact_id == artifact_id).values(expires=expires))


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

"""Rows of samplers: names for frozen weights."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, delete, func, insert, select

from tg_tinker_server.store import tables as t


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerRow:
    """One sampler. ``path`` is sealed; ``artifact_id`` is empty for a base model."""

    tenant: str
    sampler_id: str
    base_model: str
    artifact_id: str
    path: str
    created: datetime


def insert_sampler(tx: Connection, row: SamplerRow) -> None:
    """Add a sampler."""
    tx.execute(insert(t.samplers).values(**{k: getattr(row, k) for k in row.__dataclass_fields__}))


def get_sampler(tx: Connection, tenant: str, sampler_id: str) -> SamplerRow | None:
    """A tenant's sampler."""
    c = t.samplers.c
    found = tx.execute(select(t.samplers).where(c.tenant == tenant, c.sampler_id == sampler_id)).first()
    return SamplerRow(**found._mapping) if found else None


def delete_sampler(tx: Connection, tenant: str, sampler_id: str) -> None:
    """Forget a sampler."""
    c = t.samplers.c
    tx.execute(delete(t.samplers).where(c.tenant == tenant, c.sampler_id == sampler_id))


def count_samplers(tx: Connection, tenant: str) -> int:
    """How many a tenant has."""
    return tx.execute(select(func.count()).select_from(t.samplers).where(t.samplers.c.tenant == tenant)).scalar_one()

"""Rows of tenants' wrapped keys."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Connection, insert, select, update

from tg_tinker_server.store import tables as t


def get_versions(tx: Connection, tenant: str) -> list[dict[str, Any]]:
    """All versions of a tenant's key, destroyed ones too, oldest first."""
    query = select(t.tenant_keys).where(t.tenant_keys.c.tenant == tenant).order_by(t.tenant_keys.c.version)
    return [dict(r._mapping) for r in tx.execute(query)]


def put_version(tx: Connection, values: dict[str, Any]) -> None:
    """Add a version unless it is there; the stored one stays as it is."""
    c = t.tenant_keys.c
    there = select(c.version).where(c.tenant == values["tenant"], c.version == values["version"])
    if tx.execute(there).first() is None:
        tx.execute(insert(t.tenant_keys).values(**values))


def all_versions(tx: Connection) -> list[dict[str, Any]]:
    """All versions of every tenant, destroyed ones too."""
    c = t.tenant_keys.c
    return [dict(r._mapping) for r in tx.execute(select(t.tenant_keys).order_by(c.tenant, c.version))]


def replace_wrapped(tx: Connection, tenant: str, version: int, wrapped: bytes) -> None:
    """Put another wrapping of the same key in the place of the stored one."""
    c = t.tenant_keys.c
    tx.execute(
        update(t.tenant_keys)
        .where(c.tenant == tenant, c.version == version, c.destroyed.is_(None))
        .values(wrapped=wrapped)
    )


def destroy_versions(tx: Connection, tenant: str, versions: list[int], when: datetime) -> None:
    """Erase key material that is not erased yet."""
    c = t.tenant_keys.c
    tx.execute(
        update(t.tenant_keys)
        .where(c.tenant == tenant, c.version.in_(versions), c.destroyed.is_(None))
        .values(wrapped=b"", destroyed=when)
    )

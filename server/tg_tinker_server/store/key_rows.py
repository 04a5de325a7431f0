"""Rows of API keys."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, insert, select, update

from tg_tinker_server.store import tables as t


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKeyRow:
    """One API key: whose it is and what it may do. The secret is kept only as a MAC; ``policy`` is JSON."""

    key_id: str
    tenant: str
    roles: tuple[str, ...]
    mac: bytes
    created: datetime
    revoked: datetime | None
    label: str
    policy: str | None = None


def insert_api_key(tx: Connection, row: ApiKeyRow) -> None:
    """Add a key."""
    tx.execute(
        insert(t.api_keys).values(
            key_id=row.key_id,
            tenant=row.tenant,
            roles=json.dumps(list(row.roles)),
            mac=row.mac,
            created=row.created,
            revoked=row.revoked,
            label=row.label,
            policy=row.policy,
        )
    )


def _key(row: object) -> ApiKeyRow:
    values = dict(row._mapping)  # type: ignore[attr-defined]
    values["roles"] = tuple(json.loads(values["roles"]))
    return ApiKeyRow(**values)


def get_api_key(tx: Connection, key_id: str) -> ApiKeyRow | None:
    """A key by its public id, revoked or not."""
    found = tx.execute(select(t.api_keys).where(t.api_keys.c.key_id == key_id)).first()
    return _key(found) if found else None


def list_api_keys(tx: Connection) -> list[ApiKeyRow]:
    """All keys, oldest first."""
    return [_key(r) for r in tx.execute(select(t.api_keys).order_by(t.api_keys.c.created))]


def revoke_tenant(tx: Connection, tenant: str, when: datetime) -> int:
    """Revoke every key of a tenant; returns how many."""
    c = t.api_keys.c
    changed = tx.execute(update(t.api_keys).where(c.tenant == tenant, c.revoked.is_(None)).values(revoked=when))
    return int(changed.rowcount)


def revoke_api_key(tx: Connection, key_id: str, when: datetime) -> bool:
    """Revoke a key; says whether there was one to revoke."""
    c = t.api_keys.c
    changed = tx.execute(update(t.api_keys).where(c.key_id == key_id, c.revoked.is_(None)).values(revoked=when))
    return bool(changed.rowcount)

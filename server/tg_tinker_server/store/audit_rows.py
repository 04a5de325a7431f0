"""Rows of the audit log."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, bindparam, insert, select

from tg_tinker_server.store import tables as t

# Built once, as in `ledger_rows`: they run with every operation.
_C = t.audit.c
_INSERT_RECORD = insert(t.audit)
_LAST_RECORD = (
    select(_C.position, _C.record_hash).where(_C.tenant == bindparam("tenant")).order_by(_C.position.desc()).limit(1)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRow:
    """One entry of one tenant's audit log; ``body_json`` is canonical."""

    tenant: str
    position: int
    body_json: str
    prev_hash: bytes
    record_hash: bytes
    leaf_index: int


def insert_record(tx: Connection, row: AuditRow) -> None:
    """Append a record."""
    tx.execute(_INSERT_RECORD, {c.name: getattr(row, c.name) for c in t.audit.columns})


def last_record(tx: Connection, tenant: str) -> tuple[int, bytes] | None:
    """Position and hash of a tenant's newest record."""
    found = tx.execute(_LAST_RECORD, {"tenant": tenant}).first()
    return (int(found[0]), bytes(found[1])) if found else None


def records(tx: Connection, tenant: str, *, before: int | None, limit: int) -> list[AuditRow]:
    """A tenant's records, newest first, older than a position."""
    query = select(t.audit).where(t.audit.c.tenant == tenant)
    if before is not None:
        query = query.where(t.audit.c.position < before)
    return [AuditRow(**r._mapping) for r in tx.execute(query.order_by(t.audit.c.position.desc()).limit(limit))]

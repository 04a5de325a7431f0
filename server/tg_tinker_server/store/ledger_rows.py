"""Rows of datasets, their ledgers, and how often units took part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, func, insert, select, update

from tg_tinker_server.store import tables as t

_BATCH = 500  # parameters of one IN list


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetRow:
    """The budget of one dataset."""

    tenant: str
    dataset_id: str
    unit: str
    target_epsilon: float | None
    target_delta: float
    created: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerRow:
    """One entry of one dataset's ledger; ``body_json`` is canonical."""

    tenant: str
    dataset_id: str
    position: int
    kind: str
    run_id: str
    seq: int
    attempt: int
    body_json: str
    prev_hash: bytes
    entry_hash: bytes


def get_dataset(tx: Connection, tenant: str, dataset_id: str) -> DatasetRow | None:
    """A tenant's dataset."""
    c = t.datasets.c
    found = tx.execute(select(t.datasets).where(c.tenant == tenant, c.dataset_id == dataset_id)).first()
    return DatasetRow(**found._mapping) if found else None


def insert_dataset(tx: Connection, row: DatasetRow) -> None:
    """Add a dataset."""
    tx.execute(insert(t.datasets).values(**{c.name: getattr(row, c.name) for c in t.datasets.columns}))


def insert_entry(tx: Connection, row: LedgerRow) -> None:
    """Append an entry."""
    tx.execute(insert(t.ledger).values(**{c.name: getattr(row, c.name) for c in t.ledger.columns}))


def last_entry(tx: Connection, tenant: str, dataset_id: str) -> tuple[int, bytes] | None:
    """Position and hash of the newest entry."""
    c = t.ledger.c
    query = select(c.position, c.entry_hash).where(c.tenant == tenant, c.dataset_id == dataset_id)
    found = tx.execute(query.order_by(c.position.desc()).limit(1)).first()
    return (int(found[0]), bytes(found[1])) if found else None


def entries_after(tx: Connection, tenant: str, dataset_id: str, position: int) -> list[LedgerRow]:
    """Entries beyond a position, in order."""
    c = t.ledger.c
    query = select(t.ledger).where(c.tenant == tenant, c.dataset_id == dataset_id, c.position > position)
    return [LedgerRow(**r._mapping) for r in tx.execute(query.order_by(c.position))]


def largest_participation(tx: Connection, tenant: str, dataset_id: str, run_id: str) -> int:
    """The largest count of any unit in a run."""
    c = t.participations.c
    where = (c.tenant == tenant) & (c.dataset_id == dataset_id) & (c.run_id == run_id)
    return int(tx.execute(select(func.max(c.count)).where(where)).scalar() or 0)


def participations(
    tx: Connection, tenant: str, dataset_id: str, run_id: str, unit_macs: Sequence[bytes]
) -> dict[bytes, int]:
    """How often each of these units took part in a run; those that never did are left out."""
    c = t.participations.c
    found: dict[bytes, int] = {}
    for start in range(0, len(unit_macs), _BATCH):
        part = list(unit_macs[start : start + _BATCH])
        query = select(c.unit_mac, c.count).where(
            c.tenant == tenant, c.dataset_id == dataset_id, c.run_id == run_id, c.unit_mac.in_(part)
        )
        found.update({bytes(mac): int(count) for mac, count in tx.execute(query)})
    return found


def set_participations(
    tx: Connection, tenant: str, dataset_id: str, run_id: str, old: Mapping[bytes, int], new: Mapping[bytes, int]
) -> None:
    """Write new counts; ``old`` says which units have a row."""
    c = t.participations.c
    for mac, count in new.items():
        if mac in old:
            where = (c.tenant == tenant) & (c.dataset_id == dataset_id) & (c.run_id == run_id) & (c.unit_mac == mac)
            tx.execute(update(t.participations).where(where).values(count=count))
    fresh = [
        {"tenant": tenant, "dataset_id": dataset_id, "run_id": run_id, "unit_mac": mac, "count": count}
        for mac, count in new.items()
        if mac not in old
    ]
    if fresh:
        tx.execute(insert(t.participations), fresh)

"""Rows of datasets, their ledgers, and how often units took part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, bindparam, func, insert, select, update
from sqlalchemy.dialects.sqlite import insert as upsert

from tg_tinker_server.store import tables as t

_BATCH = 500  # parameters of one IN list

# Built once: what is built anew for each call costs as much again as running it.
_C = t.ledger.c
_COLUMNS = t.ledger.columns.keys()
_OF_DATASET = (_C.tenant == bindparam("tenant"), _C.dataset_id == bindparam("dataset_id"))
_OF_STEP = (*_OF_DATASET, _C.run_id == bindparam("run_id"), _C.seq == bindparam("seq"))
_INSERT_ENTRY = insert(t.ledger)
_LAST_ENTRY = select(_C.position, _C.entry_hash).where(*_OF_DATASET).order_by(_C.position.desc()).limit(1)
_ENTRIES_FROM = select(t.ledger).where(*_OF_DATASET, _C.position >= bindparam("position")).order_by(_C.position)
_WEIGHT = select(func.count(), func.coalesce(func.sum(func.length(_C.body_json)), 0)).where(*_OF_DATASET)
_ENTRIES_OF_STEP = select(t.ledger).where(*_OF_STEP)  # ordered here, SQLite reads the whole dataset in that order


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetRow:
    """The budget of one dataset, for listing; the ledger's first entry is what binds."""

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
    leaf_index: int


def insert_dataset(tx: Connection, row: DatasetRow) -> None:
    """Add a dataset."""
    tx.execute(insert(t.datasets).values(**{c.name: getattr(row, c.name) for c in t.datasets.columns}))


def raise_dataset(tx: Connection, tenant: str, dataset_id: str, target_epsilon: float) -> None:
    """Show another target in listings."""
    where = (t.datasets.c.tenant == tenant) & (t.datasets.c.dataset_id == dataset_id)
    tx.execute(update(t.datasets).where(where).values(target_epsilon=target_epsilon))


def insert_entry(tx: Connection, row: LedgerRow) -> None:
    """Append an entry."""
    tx.execute(_INSERT_ENTRY, {c.name: getattr(row, c.name) for c in t.ledger.columns})


def last_entry(tx: Connection, tenant: str, dataset_id: str) -> tuple[int, bytes] | None:
    """Position and hash of the newest entry."""
    found = tx.execute(_LAST_ENTRY, {"tenant": tenant, "dataset_id": dataset_id}).first()
    return (int(found[0]), bytes(found[1])) if found else None


def entries_from(tx: Connection, tenant: str, dataset_id: str, position: int) -> list[LedgerRow]:
    """Entries at a position and beyond, in order."""
    return list(each_entry_from(tx, tenant, dataset_id, position))


def weight(tx: Connection, tenant: str, dataset_id: str) -> tuple[int, int]:
    """How many entries a dataset has, and how many characters their bodies have."""
    found = tx.execute(_WEIGHT, {"tenant": tenant, "dataset_id": dataset_id}).one()
    return int(found[0]), int(found[1])


def each_entry_from(tx: Connection, tenant: str, dataset_id: str, position: int) -> Iterator[LedgerRow]:
    """The same one by one, in memory that does not grow. Nothing may be appended meanwhile."""
    found = tx.execute(_ENTRIES_FROM, {"tenant": tenant, "dataset_id": dataset_id, "position": position})
    return map(_entry, found)


def entries_of_step(tx: Connection, tenant: str, dataset_id: str, run_id: str, seq: int) -> list[LedgerRow]:
    """Every entry about one step of one run, in order."""
    step = {"tenant": tenant, "dataset_id": dataset_id, "run_id": run_id, "seq": seq}
    return sorted(map(_entry, tx.execute(_ENTRIES_OF_STEP, step)), key=lambda row: row.position)


def _entry(found: Row[Any]) -> LedgerRow:
    return LedgerRow(**dict(zip(_COLUMNS, found, strict=True)))


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


def unit_naming(tx: Connection, tenant: str, dataset_id: str, run_id: str) -> str | None:
    """How the units of a run get their names; "" where it counted some and nobody kept that, ``None`` before any."""
    c = t.participations.c
    of_run = (c.tenant == tenant, c.dataset_id == dataset_id, c.run_id == run_id)
    row = tx.execute(select(c.unit_mac).where(*of_run, c.count == 0).limit(1)).first()
    if row is not None:
        return bytes(row[0]).decode()
    return None if tx.execute(select(c.unit_mac).where(*of_run).limit(1)).first() is None else ""


def keep_unit_naming(tx: Connection, tenant: str, dataset_id: str, run_id: str, naming: str) -> None:
    """Keep it with the counts, as a row that counts nothing. No unit's MAC is as short."""
    key = {"tenant": tenant, "dataset_id": dataset_id, "run_id": run_id}
    tx.execute(t.participations.insert().values(**key, unit_mac=naming.encode(), count=0))


def count_participations(
    tx: Connection, tenant: str, dataset_id: str, run_id: str, unit_macs: Sequence[bytes]
) -> None:
    """Count one more release for each of these units."""
    if not unit_macs:
        return
    statement = upsert(t.participations).on_conflict_do_update(
        index_elements=list(t.participations.primary_key.columns), set_={"count": t.participations.c.count + 1}
    )
    key = {"tenant": tenant, "dataset_id": dataset_id, "run_id": run_id}
    tx.execute(statement, [{**key, "unit_mac": mac, "count": 1} for mac in unit_macs])

"""Rows of registered datasets and of their sealed records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection, delete, distinct, func, insert, select, update

from tg_tinker_server.store import tables as t

OPEN: Final = "open"  # an upload that is not finished; no dataset
SEALED: Final = "sealed"
DELETED: Final = "deleted"
_BATCH: Final = 500  # parameters of one IN list
_S, _R = t.dataset_stores.c, t.dataset_records.c


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreRow:
    """One upload, or the dataset it became.

    Attributes:
        slots: privacy units it was registered with; erasures leave them as they are.
        expected_records, received: announced, and there so far.
        records, units: left after erasures.
        wrapped_key: the dataset's key; ``None`` once it was destroyed.
    """

    tenant: str
    upload_id: str
    dataset_id: str
    status: str
    unit: str
    target_epsilon: float | None
    target_delta: float
    truncate: int
    slots: int
    expected_records: int
    received: int
    size_bytes: int
    records: int
    units: int
    key_id: str
    wrapped_key: bytes | None
    created: datetime
    updated: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordRow:
    """One record: its place, the slot of its privacy unit, its keyed id, its ciphertext."""

    position: int
    slot: int
    record_id: bytes
    sealed: bytes


def insert_store(tx: Connection, row: StoreRow) -> None:
    """Add an upload."""
    tx.execute(insert(t.dataset_stores).values(**{c.name: getattr(row, c.name) for c in t.dataset_stores.columns}))


def get_upload(tx: Connection, tenant: str, upload_id: str) -> StoreRow | None:
    """A tenant's upload, whatever became of it."""
    found = tx.execute(select(t.dataset_stores).where(_S.tenant == tenant, _S.upload_id == upload_id)).first()
    return StoreRow(**found._mapping) if found else None


def find_dataset(tx: Connection, tenant: str, dataset_id: str) -> StoreRow | None:
    """The dataset of a name, also a deleted one: a name is registered once."""
    found = tx.execute(
        select(t.dataset_stores).where(_S.tenant == tenant, _S.dataset_id == dataset_id, _S.status != OPEN)
    ).first()
    return StoreRow(**found._mapping) if found else None


def list_datasets(tx: Connection, tenant: str, *, limit: int) -> list[StoreRow]:
    """A tenant's datasets, newest first, deleted ones excepted."""
    query = select(t.dataset_stores).where(_S.tenant == tenant, _S.status == SEALED)
    return [StoreRow(**r._mapping) for r in tx.execute(query.order_by(_S.created.desc()).limit(limit))]


def count_uploads(tx: Connection, tenant: str) -> int:
    """How many uploads of a tenant are not finished."""
    query = select(func.count()).where(_S.tenant == tenant, _S.status == OPEN)
    return int(tx.execute(query).scalar_one())


def update_store(tx: Connection, tenant: str, upload_id: str, **values: Any) -> None:
    """Change columns of one upload or dataset."""
    tx.execute(update(t.dataset_stores).where(_S.tenant == tenant, _S.upload_id == upload_id).values(**values))


def delete_upload(tx: Connection, tenant: str, upload_id: str) -> None:
    """Forget an upload that is not finished. Delete its records first."""
    where = (_S.tenant == tenant) & (_S.upload_id == upload_id) & (_S.status == OPEN)
    tx.execute(delete(t.dataset_stores).where(where))


def leftovers(tx: Connection, *, idle_since: datetime) -> list[StoreRow]:
    """Of any tenant: uploads that nobody went on with, and deleted datasets that still have records."""
    records = select(_R.position).where(_R.tenant == _S.tenant, _R.upload_id == _S.upload_id).exists()
    query = select(t.dataset_stores).where(
        ((_S.status == OPEN) & (_S.updated < idle_since)) | ((_S.status == DELETED) & records)
    )
    return [StoreRow(**r._mapping) for r in tx.execute(query)]


def wrapped_keys(tx: Connection, tenant: str) -> list[StoreRow]:
    """Every upload and dataset of a tenant that has a key, for wrapping it anew."""
    query = select(t.dataset_stores).where(_S.tenant == tenant, _S.wrapped_key.is_not(None))
    return [StoreRow(**r._mapping) for r in tx.execute(query)]


def insert_records(tx: Connection, tenant: str, upload_id: str, rows: Iterable[RecordRow]) -> None:
    """Add records."""
    key = {"tenant": tenant, "upload_id": upload_id}
    values = [
        {**key, "position": r.position, "slot": r.slot, "record_id": r.record_id, "sealed": r.sealed} for r in rows
    ]
    if values:
        tx.execute(insert(t.dataset_records), values)


def ids_from(tx: Connection, tenant: str, upload_id: str, position: int, limit: int) -> list[tuple[int, int, bytes]]:
    """Position, slot and id of the records from a position on."""
    query = select(_R.position, _R.slot, _R.record_id).where(
        _R.tenant == tenant, _R.upload_id == upload_id, _R.position >= position
    )
    return [(int(p), int(s), bytes(i)) for p, s, i in tx.execute(query.order_by(_R.position).limit(limit))]


def records_from(tx: Connection, tenant: str, upload_id: str, position: int, limit: int) -> list[RecordRow]:
    """Records from a position on, in order."""
    query = select(_R.position, _R.slot, _R.record_id, _R.sealed).where(
        _R.tenant == tenant, _R.upload_id == upload_id, _R.position >= position
    )
    return [RecordRow(**r._mapping) for r in tx.execute(query.order_by(_R.position).limit(limit))]


def records_of_slots(tx: Connection, tenant: str, upload_id: str, slots: Sequence[int]) -> list[RecordRow]:
    """Every record of these units, in order of position; erased ones are simply not there."""
    found: list[RecordRow] = []
    for start in range(0, len(slots), _BATCH):
        query = select(_R.position, _R.slot, _R.record_id, _R.sealed).where(
            _R.tenant == tenant, _R.upload_id == upload_id, _R.slot.in_(list(slots[start : start + _BATCH]))
        )
        found += [RecordRow(**r._mapping) for r in tx.execute(query)]
    return sorted(found, key=lambda r: r.position)


def count_records(tx: Connection, tenant: str, upload_id: str) -> tuple[int, int, int]:
    """How many records there are, how many units they belong to, and the largest slot (-1 without any)."""
    query = select(func.count(), func.count(distinct(_R.slot)), func.max(_R.slot)).where(
        _R.tenant == tenant, _R.upload_id == upload_id
    )
    records, units, largest = tx.execute(query).one()
    return int(records), int(units), -1 if largest is None else int(largest)


def delete_records(tx: Connection, tenant: str, upload_id: str, record_ids: Sequence[bytes]) -> int:
    """Delete records by id; says how many there were."""
    gone = 0
    for start in range(0, len(record_ids), _BATCH):
        part = list(record_ids[start : start + _BATCH])
        where = (_R.tenant == tenant) & (_R.upload_id == upload_id) & _R.record_id.in_(part)
        gone += tx.execute(delete(t.dataset_records).where(where)).rowcount
    return gone


def delete_some_records(tx: Connection, tenant: str, upload_id: str, limit: int) -> int:
    """Delete up to ``limit`` records of an upload or dataset; says how many."""
    doomed = [p for p, *_ in ids_from(tx, tenant, upload_id, 0, limit)]
    if doomed:
        mine = (_R.tenant == tenant) & (_R.upload_id == upload_id)
        tx.execute(delete(t.dataset_records).where(mine & _R.position.between(doomed[0], doomed[-1])))
    return len(doomed)

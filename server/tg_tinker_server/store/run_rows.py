"""Rows of training runs and of the results of their operations."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, bindparam, delete, func, insert, select, update

from tg_tinker_server.store import tables as t

# Built once, as in `ledger_rows`: they run with every step. SQLAlchemy keeps the names of columns for new values.
_R, _C = t.runs.c, t.results.c
_UPDATE_RUN = update(t.runs).where(
    _R.tenant == bindparam("its_tenant"), _R.run_id == bindparam("its_run_id"), _R.status != "deleted"
)
_INSERT_RESULT = insert(t.results)
_PRUNE_RESULTS = delete(t.results).where(
    _C.tenant == bindparam("tenant"), _C.run_id == bindparam("run_id"), _C.seq <= bindparam("upto")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """One training run as it stands after its last settled step."""

    tenant: str
    run_id: str
    request_id: str
    config_json: str
    status: str
    step: int
    durable_seq: int
    state_artifact_id: str | None
    created: datetime
    updated: datetime
    dataset_id: str | None
    noise_multiplier: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultRow:
    """The sealed outcome of one operation; ``request_mac`` recognises a changed retry."""

    tenant: str
    run_id: str
    seq: int
    operation: str
    request_mac: bytes
    status: str
    sealed: bytes
    future_id: str
    created: datetime


def _run(row: Any) -> RunRow:
    return RunRow(**row._mapping)


def insert_run(tx: Connection, row: RunRow) -> None:
    """Add a run."""
    tx.execute(insert(t.runs).values(**{c.name: getattr(row, c.name) for c in t.runs.columns}))


def get_run(tx: Connection, tenant: str, run_id: str) -> RunRow | None:
    """A tenant's run, deleted ones excepted."""
    found = tx.execute(
        select(t.runs).where(t.runs.c.tenant == tenant, t.runs.c.run_id == run_id, t.runs.c.status != "deleted")
    ).first()
    return _run(found) if found else None


def get_run_of_any_status(tx: Connection, tenant: str, run_id: str) -> RunRow | None:
    """A tenant's run, deleted ones included: its checkpoints outlive it."""
    found = tx.execute(select(t.runs).where(t.runs.c.tenant == tenant, t.runs.c.run_id == run_id)).first()
    return _run(found) if found else None


def find_run_by_request(tx: Connection, tenant: str, request_id: str) -> RunRow | None:
    """The run that a create request made, if it did."""
    found = tx.execute(select(t.runs).where(t.runs.c.tenant == tenant, t.runs.c.request_id == request_id)).first()
    return _run(found) if found else None


def list_runs(
    tx: Connection, tenant: str, *, status: str | None, dataset_id: str | None, limit: int | None, offset: int
) -> list[RunRow]:
    """A tenant's runs, newest first, deleted ones excepted; those of one dataset, or of all."""
    query = select(t.runs).where(_listed(tenant, status, dataset_id))
    order = (t.runs.c.created.desc(), t.runs.c.run_id)  # a total order: pages are disjoint
    return [_run(r) for r in tx.execute(query.order_by(*order).limit(limit).offset(offset))]


def count_runs(tx: Connection, tenant: str, *, status: str | None) -> int:
    """How many `list_runs` has."""
    where = _listed(tenant, status, None)
    return int(tx.execute(select(func.count()).select_from(t.runs).where(where)).scalar_one())


def _listed(tenant: str, status: str | None, dataset_id: str | None) -> Any:
    where = (t.runs.c.tenant == tenant) & (t.runs.c.status != "deleted")
    if status:
        where &= t.runs.c.status == status
    if dataset_id is not None:
        where &= t.runs.c.dataset_id == dataset_id
    return where


def count_active(tx: Connection, tenant: str) -> int:
    """How many runs of a tenant are active."""
    where = (t.runs.c.tenant == tenant) & (t.runs.c.status == "active")
    return int(tx.execute(select(func.count()).select_from(t.runs).where(where)).scalar_one())


def update_run(tx: Connection, tenant: str, run_id: str, **values: Any) -> None:
    """Change columns of one run; a deleted one stays as it is."""
    tx.execute(_UPDATE_RUN, {"its_tenant": tenant, "its_run_id": run_id, **values})


def referenced_states(tx: Connection) -> set[str]:
    """Every state artifact that some run still needs, of any tenant."""
    query = select(t.runs.c.state_artifact_id).where(t.runs.c.status != "deleted")
    return {s for (s,) in tx.execute(query) if s is not None}


def put_results(tx: Connection, rows: list[ResultRow]) -> None:
    """Keep the outcomes of operations."""
    if rows:
        tx.execute(_INSERT_RESULT, [{c.name: getattr(row, c.name) for c in t.results.columns} for row in rows])


def get_result(tx: Connection, tenant: str, run_id: str, seq: int) -> ResultRow | None:
    """The kept outcome at one position of a tenant's run."""
    c = t.results.c
    found = tx.execute(select(t.results).where(c.tenant == tenant, c.run_id == run_id, c.seq == seq)).first()
    return ResultRow(**found._mapping) if found else None


def results_after(tx: Connection, tenant: str, run_id: str, seq: int) -> list[ResultRow]:
    """Kept outcomes beyond a position: they need not be executed again."""
    c = t.results.c
    query = select(t.results).where(c.tenant == tenant, c.run_id == run_id, c.seq > seq).order_by(c.seq)
    return [ResultRow(**r._mapping) for r in tx.execute(query)]


def prune_results(tx: Connection, tenant: str, run_id: str, *, upto: int) -> None:
    """Forget outcomes up to a position."""
    tx.execute(_PRUNE_RESULTS, {"tenant": tenant, "run_id": run_id, "upto": upto})


def delete_results(tx: Connection, tenant: str, run_id: str) -> None:
    """Forget all outcomes of a run."""
    c = t.results.c
    tx.execute(delete(t.results).where(c.tenant == tenant, c.run_id == run_id))

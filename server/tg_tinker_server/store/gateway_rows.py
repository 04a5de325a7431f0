"""Rows of the Tinker protocol's sessions, and of requests that were accepted and are not durable yet."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, delete, func, insert, select, update
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from tg_tinker_server.store import tables as t
from tg_tinker_server.store.run_rows import RunRow

_S, _J = t.gateway_sessions.c, t.gateway_requests.c


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRow:
    """One session; ``sealed`` holds what its user said about it."""

    tenant: str
    session_id: str
    key_id: str
    sealed: bytes
    created: datetime
    finished: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRow:
    """An accepted request of a model; ``entry_id`` is made of model and position, and ``sealed`` is bound to it."""

    tenant: str
    model_id: str
    seq: int
    entry_id: str
    name: str
    actor: str
    sealed: bytes
    created: datetime


def insert_session(tx: Connection, row: SessionRow) -> None:
    """Add a session."""
    tx.execute(insert(t.gateway_sessions).values(**{c.name: getattr(row, c.name) for c in _S}))


def get_session(tx: Connection, tenant: str, session_id: str) -> SessionRow | None:
    """A tenant's session."""
    found = tx.execute(select(t.gateway_sessions).where(_S.tenant == tenant, _S.session_id == session_id)).first()
    return SessionRow(**found._mapping) if found else None


def list_sessions(
    tx: Connection, tenant: str, key_id: str | None, *, limit: int, offset: int
) -> tuple[list[str], int]:
    """Ids of a tenant's sessions, newest first, and how many there are; of one key where it is given."""
    where = _S.tenant == tenant
    if key_id is not None:
        where &= _S.key_id == key_id
    query = select(_S.session_id).where(where).order_by(_S.created.desc(), _S.session_id)
    total = tx.execute(select(func.count()).select_from(t.gateway_sessions).where(where)).scalar_one()
    return [i for (i,) in tx.execute(query.limit(limit).offset(offset))], int(total)


def finish_session(tx: Connection, tenant: str, session_id: str, when: datetime) -> None:
    """Note that a session is over; the first time counts."""
    where = (_S.tenant == tenant) & (_S.session_id == session_id) & _S.finished.is_(None)
    tx.execute(update(t.gateway_sessions).where(where).values(finished=when))


def insert_request(tx: Connection, row: RequestRow) -> None:
    """Keep an accepted request; the first at a position stays."""
    values = {c.name: getattr(row, c.name) for c in _J}
    tx.execute(sqlite_insert(t.gateway_requests).values(**values).on_conflict_do_nothing())


def request_positions(tx: Connection, tenant: str, model_id: str) -> list[int]:
    """Positions of what was accepted for a model and is kept, in order."""
    where = (_J.tenant == tenant) & (_J.model_id == model_id)
    return [seq for (seq,) in tx.execute(select(_J.seq).where(where).order_by(_J.seq))]


def get_request(tx: Connection, tenant: str, model_id: str, seq: int) -> RequestRow | None:
    """What was accepted at a position, while it is kept."""
    where = (_J.tenant == tenant) & (_J.model_id == model_id) & (_J.seq == seq)
    found = tx.execute(select(t.gateway_requests).where(where)).first()
    return RequestRow(**found._mapping) if found else None


def waiting_models(tx: Connection) -> list[tuple[str, str]]:
    """Tenant and model of everything that is kept, of any tenant."""
    return [(a, b) for a, b in tx.execute(select(_J.tenant, _J.model_id).distinct())]


def drop_requests(tx: Connection, tenant: str, model_id: str, *, upto: int, seqs: tuple[int, ...] = ()) -> None:
    """Forget requests up to a position (0, the creation, stays), and single ones."""
    where = (_J.tenant == tenant) & (_J.model_id == model_id)
    tx.execute(delete(t.gateway_requests).where(where & (((_J.seq >= 1) & (_J.seq <= upto)) | _J.seq.in_(seqs))))


def forget_old(tx: Connection, before: datetime) -> None:
    """Forget everything kept for models whose newest request is older, of any tenant."""
    newest = select(_J.tenant, _J.model_id).group_by(_J.tenant, _J.model_id).having(func.max(_J.created) < before)
    for tenant, model_id in tx.execute(newest).all():
        forget_model(tx, tenant, model_id)


def forget_model(tx: Connection, tenant: str, model_id: str) -> None:
    """Forget everything kept for a model."""
    tx.execute(delete(t.gateway_requests).where(_J.tenant == tenant, _J.model_id == model_id))


def list_models(
    tx: Connection, tenant: str, *, prefix: str, dataset_id: str | None, limit: int, offset: int
) -> tuple[list[RunRow], int]:
    """Runs whose request_id begins with a prefix, newest first, and how many there are; of one dataset if given."""
    r = t.runs.c
    where = (r.tenant == tenant) & (r.status != "deleted") & r.request_id.startswith(prefix, autoescape=True)
    if dataset_id is not None:
        where &= r.dataset_id == dataset_id
    total = tx.execute(select(func.count()).select_from(t.runs).where(where)).scalar_one()
    query = select(t.runs).where(where).order_by(r.created.desc(), r.run_id).limit(limit).offset(offset)
    return [RunRow(**row._mapping) for row in tx.execute(query)], int(total)


def samplers_of_session(tx: Connection, tenant: str, prefix: str) -> list[str]:
    """Ids of the samplers that begin with a prefix, oldest first."""
    c = t.samplers.c
    where = (c.tenant == tenant) & c.sampler_id.startswith(prefix, autoescape=True)
    return [
        i for (i,) in tx.execute(select(c.sampler_id).where(where).order_by(c.created, c.sampler_id).limit(10_000))
    ]

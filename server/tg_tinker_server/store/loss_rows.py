"""Rows of losses that callers made."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection, func, insert, select

from tg_tinker_server.store import tables as t


def insert_loss(tx: Connection, tenant: str, loss_id: str, graph_json: str, created: datetime) -> None:
    """Add a loss; ``graph_json`` is sealed."""
    tx.execute(insert(t.custom_losses).values(tenant=tenant, loss_id=loss_id, graph_json=graph_json, created=created))


def get_loss(tx: Connection, tenant: str, loss_id: str) -> str | None:
    """The sealed graph of a tenant's loss."""
    c = t.custom_losses.c
    found = tx.execute(select(c.graph_json).where(c.tenant == tenant, c.loss_id == loss_id)).first()
    return str(found[0]) if found else None


def count_losses(tx: Connection, tenant: str) -> int:
    """How many losses a tenant has."""
    where = t.custom_losses.c.tenant == tenant
    return int(tx.execute(select(func.count()).select_from(t.custom_losses).where(where)).scalar_one())

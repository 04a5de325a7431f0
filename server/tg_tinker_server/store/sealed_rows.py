"""Every small value that is sealed under a tenant's key, wherever it lies, for sealing it anew after a rotation.

A new column of that kind is added to `COLUMNS`, or a rotation that destroys old keys would lose it; a test compares
the list with what a server seals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, Table, select, update

from tg_tinker_server.store import tables as t

_PAGE: Final = 500


@dataclass(frozen=True, slots=True)
class SealedColumn:
    """Where sealed values of one purpose lie.

    Attributes:
        context: the column that each value is bound to.
        is_text: stored as base64.
    """

    table: Table
    column: str
    context: str
    purpose: str
    is_text: bool


COLUMNS: Final = (
    SealedColumn(t.results, "sealed", "future_id", "result", False),
    SealedColumn(t.runs, "config_json", "run_id", "run-config", True),
    SealedColumn(t.artifacts, "name", "artifact_id", "artifact-name", True),
    SealedColumn(t.artifacts, "metadata_json", "artifact_id", "artifact-metadata", True),
    SealedColumn(t.custom_losses, "graph_json", "loss_id", "custom-loss", True),
    SealedColumn(t.samplers, "path", "sampler_id", "sampler-path", True),
    SealedColumn(t.gateway_sessions, "sealed", "session_id", "tinker-session", False),
    SealedColumn(t.gateway_requests, "sealed", "entry_id", "tinker-request", False),
)


def page_after(tx: Connection, column: SealedColumn, tenant: str, last: str) -> list[tuple[str, Any]]:
    """Contexts after ``last`` and their stored values, a few hundred; none at the end."""
    c = column.table.c
    query = (
        select(c[column.context], c[column.column])
        .where(c.tenant == tenant, c[column.context] > last, c[column.column].is_not(None))
        .order_by(c[column.context])
        .limit(_PAGE)
    )
    return [(str(context), value) for context, value in tx.execute(query)]


def replace(tx: Connection, column: SealedColumn, tenant: str, context: str, old: Any, new: Any) -> None:
    """Put a value in the place of another, if that is still there."""
    c = column.table.c
    where = (c.tenant == tenant) & (c[column.context] == context) & (c[column.column] == old)
    tx.execute(update(column.table).where(where).values({column.column: new}))

"""Every entry of ledger and audit log becomes a leaf of its tenant's Merkle tree, in the order it was written."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator
from datetime import datetime

import sqlalchemy as sa
from alembic import op

from tg_tinker.transparency.merkle import leaf_hash, node_hash

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_CHAIN = {"ledger": ("tenant", "dataset_id"), "audit": ("tenant",)}
_MOMENT = {"ledger": "time", "audit": "completed"}
_PAGE = 1000


def upgrade() -> None:
    op.create_table(
        "log_nodes",
        sa.Column("tenant", sa.String(200), primary_key=True),
        sa.Column("level", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("idx", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("hash", sa.LargeBinary, nullable=False),
        sqlite_with_rowid=False,
    )
    for table in _CHAIN:
        for trigger in ("no_update", "no_delete", "only_at_end"):
            op.execute(f"DROP TRIGGER {table}_{trigger}")
        op.add_column(table, sa.Column("leaf_index", sa.BigInteger, nullable=True))
    connection = op.get_bind()
    tenants = connection.execute(sa.text("SELECT tenant FROM ledger UNION SELECT tenant FROM audit ORDER BY 1"))
    for (tenant,) in tenants.fetchall():
        _plant(connection, tenant)
    for table in _CHAIN:
        # A table of its own name again, with the column filled and required.
        with op.batch_alter_table(table) as batch:
            batch.alter_column("leaf_index", existing_type=sa.BigInteger, nullable=False)
            batch.create_index(f"ix_{table}_leaf", ["tenant", "leaf_index"])
    for table, chain in _CHAIN.items():
        _make_append_only(table, "position", chain)
    _make_append_only("log_nodes", "idx", ("tenant", "level"))


def _plant(connection: sa.Connection, tenant: str) -> None:
    """Grow a tenant's tree over everything written so far."""
    frontier: list[bytes | None] = []  # the complete subtrees at the right edge, one per level
    streams = [_entries(connection, table, tenant) for table in _CHAIN]
    for index, (_, table, rowid, body) in enumerate(heapq.merge(*streams, key=lambda entry: entry[0])):
        connection.execute(
            sa.text(f"UPDATE {table} SET leaf_index = :leaf WHERE rowid = :rowid"),  # noqa: S608 - constants above
            {"leaf": index, "rowid": rowid},
        )
        value, level, at = leaf_hash(body.encode()), 0, index
        _insert(connection, tenant, level, at, value)
        while level < len(frontier) and (left := frontier[level]) is not None:
            value, frontier[level] = node_hash(left, value), None
            level, at = level + 1, at // 2
            _insert(connection, tenant, level, at, value)
        frontier += [None] * (level + 1 - len(frontier))
        frontier[level] = value


def _entries(connection: sa.Connection, table: str, tenant: str) -> Iterator[tuple[datetime, str, int, str]]:
    """A table's entries as they were inserted, each with a moment that never goes back."""
    latest, last = None, -1
    query = sa.text(
        f"SELECT rowid, body_json FROM {table} WHERE tenant = :tenant AND rowid > :last "  # noqa: S608 - constants
        f"ORDER BY rowid LIMIT {_PAGE}"
    )
    while rows := connection.execute(query, {"tenant": tenant, "last": last}).fetchall():
        for rowid, body in rows:
            moment = datetime.fromisoformat(json.loads(body)[_MOMENT[table]])
            latest = moment if latest is None else max(latest, moment)
            yield latest, table, int(rowid), str(body)
        last = int(rows[-1][0])


def _insert(connection: sa.Connection, tenant: str, level: int, at: int, value: bytes) -> None:
    connection.execute(
        sa.text("INSERT INTO log_nodes (tenant, level, idx, hash) VALUES (:tenant, :level, :idx, :hash)"),
        {"tenant": tenant, "level": level, "idx": at, "hash": value},
    )


def _make_append_only(table: str, place: str, chain: tuple[str, ...]) -> None:
    """Refuse UPDATE and DELETE, and INSERT anywhere but right after the chain's last row."""
    for verb in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
            f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
        )
    same_chain = " AND ".join(f"{column} = NEW.{column}" for column in chain)
    op.execute(
        f"CREATE TRIGGER {table}_only_at_end BEFORE INSERT ON {table} "  # noqa: S608 - constants above
        f"WHEN NEW.{place} != (SELECT COALESCE(MAX({place}) + 1, 0) FROM {table} WHERE {same_chain}) "
        f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
    )


def downgrade() -> None:
    raise NotImplementedError("the log only goes forward")

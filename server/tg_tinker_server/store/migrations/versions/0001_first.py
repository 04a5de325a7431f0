"""The first tables, and the triggers that keep the ledger and the audit log append-only."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_APPEND_ONLY = {"ledger": ("tenant", "dataset_id"), "audit": ("tenant",)}


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("key_id", sa.String(32), primary_key=True),
        sa.Column("tenant", sa.String(200), nullable=False),
        sa.Column("roles", sa.Text, nullable=False),
        sa.Column("mac", sa.LargeBinary, nullable=False),
        sa.Column("created", sa.DateTime, nullable=False),
        sa.Column("revoked", sa.DateTime),
        sa.Column("label", sa.Text, nullable=False),
    )
    op.create_index("ix_api_keys_tenant", "api_keys", ["tenant"])
    op.create_table(
        "tenant_keys",
        sa.Column("tenant", sa.String(200), primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("wrapped", sa.LargeBinary, nullable=False),
        sa.Column("created", sa.DateTime, nullable=False),
        sa.Column("destroyed", sa.DateTime),
    )
    op.create_table(
        "runs",
        sa.Column("tenant", sa.String(200), primary_key=True),
        sa.Column("run_id", sa.String(64), primary_key=True),
        sa.Column("request_id", sa.String(128), nullable=False),
        sa.Column("config_json", sa.Text, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("step", sa.Integer, nullable=False),
        sa.Column("durable_seq", sa.BigInteger, nullable=False),
        sa.Column("state_artifact_id", sa.String(64)),
        sa.Column("created", sa.DateTime, nullable=False),
        sa.Column("updated", sa.DateTime, nullable=False),
        sa.Column("dataset_id", sa.String(200)),
        sa.Column("noise_multiplier", sa.Float(53)),
        sa.UniqueConstraint("tenant", "request_id", name="uq_runs_request"),
    )
    op.create_table(
        "results",
        sa.Column("tenant", sa.String(200), primary_key=True),
        sa.Column("run_id", sa.String(64), primary_key=True),
        sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("operation", sa.String(32), nullable=False),
        sa.Column("request_mac", sa.LargeBinary, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("sealed", sa.LargeBinary, nullable=False),
        sa.Column("future_id", sa.String(96), nullable=False),
        sa.Column("created", sa.DateTime, nullable=False),
    )
    op.create_table(
        "artifacts",
        sa.Column("tenant", sa.String(200), primary_key=True),
        sa.Column("artifact_id", sa.String(64), primary_key=True),
        sa.Column("run_id", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("step", sa.Integer, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("content_hash", sa.String(80), nullable=False),
        sa.Column("algorithm", sa.String(40), nullable=False),
        sa.Column("key_id", sa.String(300), nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("created", sa.DateTime, nullable=False),
        sa.Column("deleted", sa.DateTime),
    )
    op.create_table(
        "datasets",
        sa.Column("tenant", sa.String(200), primary_key=True),
        sa.Column("dataset_id", sa.String(200), primary_key=True),
        sa.Column("unit", sa.String(32), nullable=False),
        sa.Column("target_epsilon", sa.Float(53)),
        sa.Column("target_delta", sa.Float(53), nullable=False),
        sa.Column("created", sa.DateTime, nullable=False),
    )
    op.create_table(
        "ledger",
        sa.Column("tenant", sa.String(200), primary_key=True),
        sa.Column("dataset_id", sa.String(200), primary_key=True),
        sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("run_id", sa.String(64), nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("body_json", sa.Text, nullable=False),
        sa.Column("prev_hash", sa.LargeBinary, nullable=False),
        sa.Column("entry_hash", sa.LargeBinary, nullable=False),
        sa.UniqueConstraint("tenant", "dataset_id", "run_id", "seq", "attempt", "kind", name="uq_ledger_once"),
    )
    op.create_table(
        "participations",
        sa.Column("tenant", sa.String(200), primary_key=True),
        sa.Column("dataset_id", sa.String(200), primary_key=True),
        sa.Column("run_id", sa.String(64), primary_key=True),
        sa.Column("unit_mac", sa.LargeBinary, primary_key=True),
        sa.Column("count", sa.Integer, nullable=False),
    )
    op.create_table(
        "audit",
        sa.Column("tenant", sa.String(200), primary_key=True),
        sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("body_json", sa.Text, nullable=False),
        sa.Column("prev_hash", sa.LargeBinary, nullable=False),
        sa.Column("record_hash", sa.LargeBinary, nullable=False),
    )
    for table, chain in _APPEND_ONLY.items():
        _make_append_only(table, chain)


def _make_append_only(table: str, chain: tuple[str, ...]) -> None:
    """Refuse UPDATE and DELETE, and INSERT anywhere but right after the chain's last row."""
    for verb in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
            f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
        )
    same_chain = " AND ".join(f"{column} = NEW.{column}" for column in chain)
    # INSERT OR REPLACE would otherwise remove a row without firing the DELETE trigger.
    op.execute(
        f"CREATE TRIGGER {table}_only_at_end BEFORE INSERT ON {table} "  # noqa: S608 - constants above
        f"WHEN NEW.position != (SELECT COALESCE(MAX(position) + 1, 0) FROM {table} WHERE {same_chain}) "
        f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
    )


def downgrade() -> None:
    raise NotImplementedError("the ledger only goes forward")

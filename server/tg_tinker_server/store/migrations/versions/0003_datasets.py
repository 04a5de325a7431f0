"""Registered datasets and their sealed records."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "dataset_stores",
        sa.Column("tenant", sa.String(200), primary_key=True),
        sa.Column("upload_id", sa.String(64), primary_key=True),
        sa.Column("dataset_id", sa.String(200), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("unit", sa.String(32), nullable=False),
        sa.Column("target_epsilon", sa.Float(53)),
        sa.Column("target_delta", sa.Float(53), nullable=False),
        sa.Column("truncate", sa.Integer, nullable=False),
        sa.Column("slots", sa.BigInteger, nullable=False),
        sa.Column("expected_records", sa.BigInteger, nullable=False),
        sa.Column("received", sa.BigInteger, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("records", sa.BigInteger, nullable=False),
        sa.Column("units", sa.BigInteger, nullable=False),
        sa.Column("key_id", sa.String(300), nullable=False),
        sa.Column("wrapped_key", sa.LargeBinary),
        sa.Column("created", sa.DateTime, nullable=False),
        sa.Column("updated", sa.DateTime, nullable=False),
    )
    # A name is registered once; deleting the records does not free it.
    finished = sa.text("status != 'open'")
    op.create_index(
        "uq_dataset_stores_name",
        "dataset_stores",
        ["tenant", "dataset_id"],
        unique=True,
        sqlite_where=finished,
        postgresql_where=finished,
    )
    op.create_table(
        "dataset_records",
        sa.Column("tenant", sa.String(200), primary_key=True),
        sa.Column("upload_id", sa.String(64), primary_key=True),
        sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("slot", sa.BigInteger, nullable=False),
        sa.Column("record_id", sa.LargeBinary, nullable=False),
        sa.Column("sealed", sa.LargeBinary, nullable=False),
        sa.UniqueConstraint("tenant", "upload_id", "record_id", name="uq_dataset_records_id"),
    )
    op.create_index("ix_dataset_records_slot", "dataset_records", ["tenant", "upload_id", "slot"])


def downgrade() -> None:
    raise NotImplementedError("the ledger only goes forward")

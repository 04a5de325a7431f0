"""Names, purposes and lifetimes of checkpoints; what a key may only do; losses of callers."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("api_keys", sa.Column("policy", sa.Text))
    op.add_column("artifacts", sa.Column("purpose", sa.String(24), nullable=False, server_default="weights"))
    op.add_column("artifacts", sa.Column("name_mac", sa.LargeBinary))
    op.add_column("artifacts", sa.Column("expires", sa.DateTime))
    op.add_column("artifacts", sa.Column("optimizer", sa.Boolean))
    op.add_column("artifacts", sa.Column("metadata_json", sa.Text))
    named = sa.text("deleted IS NULL AND name_mac IS NOT NULL")
    op.create_index(
        "uq_artifacts_name",
        "artifacts",
        ["tenant", "run_id", "purpose", "name_mac"],
        unique=True,
        sqlite_where=named,
        postgresql_where=named,
    )
    op.create_table(
        "custom_losses",
        sa.Column("tenant", sa.String(200), primary_key=True),
        sa.Column("loss_id", sa.String(64), primary_key=True),
        sa.Column("graph_json", sa.Text, nullable=False),
        sa.Column("created", sa.DateTime, nullable=False),
    )


def downgrade() -> None:
    raise NotImplementedError("the ledger only goes forward")

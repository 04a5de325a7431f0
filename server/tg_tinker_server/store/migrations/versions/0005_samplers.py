"""What can be sampled from."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "samplers",
        sa.Column("tenant", sa.String(200), primary_key=True),
        sa.Column("sampler_id", sa.String(128), primary_key=True),
        sa.Column("base_model", sa.Text, nullable=False),
        sa.Column("artifact_id", sa.String(64), nullable=False),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("created", sa.DateTime, nullable=False),
    )


def downgrade() -> None:
    raise NotImplementedError("the ledger only goes forward")

"""The first schema.

Revision ID: 0001
"""

from __future__ import annotations

from alembic import op

from tg_tinker_server.store.tables import metadata

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create every table with its triggers."""
    metadata.create_all(op.get_bind())

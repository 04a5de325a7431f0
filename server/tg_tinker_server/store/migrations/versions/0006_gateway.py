"""Sessions of the Tinker protocol, and requests that were accepted and are not durable yet."""

from __future__ import annotations

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    pass

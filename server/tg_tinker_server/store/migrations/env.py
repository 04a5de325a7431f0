"""Alembic's entry: runs on the connection that Database.open hands in."""

from __future__ import annotations

from alembic import context

from tg_tinker_server.store.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()

"""Joins the keyring to the database: tenants' wrapped keys as rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime

from tg_tinker_server.crypto.key_rows import KeyRow
from tg_tinker_server.store import tenant_key_rows
from tg_tinker_server.store.database import Database


@dataclass(frozen=True, slots=True)
class StoredKeyRows:
    """The keyring's table of keys, durable when a call returns."""

    db: Database

    def get_versions(self, tenant: str) -> list[KeyRow]:
        """All versions of a tenant, oldest first."""
        return [KeyRow(**v) for v in self.db.read(lambda tx: tenant_key_rows.get_versions(tx, tenant))]

    def put_version(self, row: KeyRow) -> None:
        """Add a version unless it is there."""
        self.db.write(lambda tx: tenant_key_rows.put_version(tx, asdict(row)))

    def destroy_versions(self, tenant: str, versions: list[int], when: datetime) -> None:
        """Erase versions."""
        self.db.write(lambda tx: tenant_key_rows.destroy_versions(tx, tenant, versions, when))

"""Where the wrapped keys of tenants are kept: the row, the interface, and an implementation in memory."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRow:
    """One version of one tenant's key.

    Attributes:
        version: 1, 2, ... ; the highest that is not destroyed seals new things.
        wrapped: the key under the root key; empty once destroyed.
        destroyed: when ``wrapped`` was erased; the row stays, so that the version is never used again.
    """

    tenant: str
    version: int
    wrapped: bytes
    created: datetime
    destroyed: datetime | None = None


class KeyRows(Protocol):
    """Table of tenants' keys. Every call is durable when it returns."""

    def get_versions(self, tenant: str) -> list[KeyRow]:
        """All versions of a tenant, destroyed ones too, oldest first."""
        ...

    def put_version(self, row: KeyRow) -> None:
        """Add a version. If (tenant, version) is taken the stored row stays as it is, silently.

        Two servers may race to make a tenant's first key; the loser reads back what the winner wrote.
        """
        ...

    def destroy_versions(self, tenant: str, versions: list[int], when: datetime) -> None:
        """Overwrite ``wrapped`` with nothing and set ``destroyed`` where it is not set yet."""
        ...


class MemoryKeyRows:
    """Keys of tenants that live as long as the process."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, int], KeyRow] = {}
        self._lock = threading.Lock()

    def get_versions(self, tenant: str) -> list[KeyRow]:
        """All versions of a tenant, oldest first."""
        with self._lock:
            return sorted((r for r in self._rows.values() if r.tenant == tenant), key=lambda r: r.version)

    def put_version(self, row: KeyRow) -> None:
        """Add a version unless it is there."""
        with self._lock:
            self._rows.setdefault((row.tenant, row.version), row)

    def destroy_versions(self, tenant: str, versions: list[int], when: datetime) -> None:
        """Erase versions."""
        with self._lock:
            for version in versions:
                row = self._rows.get((tenant, version))
                if row is not None and row.destroyed is None:
                    self._rows[tenant, version] = replace(row, wrapped=b"", destroyed=when)

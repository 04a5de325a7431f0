"""Changes the keys of tenants: a new version, and everything old wrapped or sealed anew under it; or no keys at all.

Nothing here remembers how far it came. What is wrapped under an older version says so itself, so a rotation that was
interrupted is finished by running it again, and doing it twice does no harm.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker_server.artifacts.vault import Vault
from tg_tinker_server.crypto.aead import DecryptionError
from tg_tinker_server.crypto.envelope import TenantKeyring, rewrap_row
from tg_tinker_server.crypto.key_rows import KeyRow
from tg_tinker_server.crypto.keys import KeyProvider
from tg_tinker_server.ledger.audit import AuditLog, AuditRecord
from tg_tinker_server.service.dataset_keys import DatasetKeys
from tg_tinker_server.service.durability import now
from tg_tinker_server.store import artifact_rows, dataset_rows, key_rows, sealed_rows, tenant_key_rows
from tg_tinker_server.store.database import Database, Transaction
from tg_tinker_server.store.sealed_rows import SealedColumn

OPERATOR = "operator"


@dataclass(slots=True)
class Renewed:
    """What a rotation wrapped or sealed anew.

    Attributes:
        damaged: artifacts that do not open under any key; they stay as they are.
    """

    key_id: str
    artifacts: int = 0
    datasets: int = 0
    values: int = 0
    damaged: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class KeyRotation:
    """Rotation, change of the root key, and destruction. Used on the server's machine only."""

    db: Database
    keyring: TenantKeyring
    vault: Vault

    def tenants(self) -> list[str]:
        """Who has a key that was not destroyed; the server's own tenant among them."""
        return sorted({r.tenant for r in self._rows() if r.destroyed is None})

    def versions(self, tenant: str) -> list[KeyRow]:
        """All versions of a tenant's key, oldest first."""
        return [r for r in self._rows() if r.tenant == tenant]

    def rotate(self, tenant: str) -> Renewed:
        """Add a version and put everything of the tenant under it. Safe while the server runs.

        Raises:
            InvalidRequestError: there is no such tenant, or its keys were destroyed.
        """
        self.require(tenant)
        started = now()
        self.keyring.rotate(tenant)
        renewed = self.renew(tenant)
        AuditLog(self.db).append(tenant, _record("rotate_keys", started, renewed.key_id)).result()
        return renewed

    def renew(self, tenant: str) -> Renewed:
        """Put what is still under older versions under the newest one; all of a rotation but the new version."""
        self.require(tenant)
        renewed = Renewed(self.keyring.key_id(tenant))
        self._renew_artifacts(tenant, renewed)
        keys = DatasetKeys(self.keyring)
        for row in self.db.read(lambda tx: dataset_rows.wrapped_keys(tx, tenant)):
            if row.key_id != renewed.key_id:
                wrapped = keys.rewrap(row)
                self.db.write(_store_update(row, wrapped.key_id, wrapped.wrapped))
                renewed.datasets += 1
        for column in sealed_rows.COLUMNS:
            renewed.values += self._renew_values(tenant, column)
        return renewed

    def destroy_old(self, tenant: str) -> None:
        """Destroy every version but the newest. Only while no server runs: it could be sealing under an older one.

        Raises:
            ServerError: something cannot be put under the newest version, and would be lost. Or as in `shred`.
        """
        renewed = self.renew(tenant)
        if renewed.damaged:
            raise ServerError(
                f"{len(renewed.damaged)} artifacts of {tenant} do not open and would be lost for good, e.g. "
                f"{renewed.damaged[0]}; restore or delete them first"
            )
        self.keyring.destroy_old_versions(tenant)
        self.db.forget_deleted()

    def shred(self, tenant: str) -> int:
        """Destroy every key of a tenant and revoke its API keys; returns how many. Only while no server runs.

        All of it, its record too, is one transaction.

        Raises:
            InvalidRequestError: there is no such tenant.
            ServerError: the keys are destroyed, and older versions of the database's pages still hold them, because
                somebody keeps reading; the next start of a server erases those.
        """
        self.require(tenant)
        started = now()
        versions = [r.version for r in self.versions(tenant)]

        def write(tx: Transaction) -> int:
            tenant_key_rows.destroy_versions(tx, tenant, versions, started)
            AuditLog.insert(tx, tenant, _record("shred_keys", started, ""))
            return key_rows.revoke_tenant(tx, tenant, started)

        revoked = self.db.write(write)
        self.keyring.destroy_tenant(tenant)  # here only what is in memory is left
        self.db.forget_deleted()
        return revoked

    def rewrap_root(self, old: KeyProvider, new: KeyProvider) -> int:
        """Put every tenant's keys under another root key, all or none; returns how many. Only while no server runs.

        Raises:
            ServerError: a key does not open under ``old``, or ``new`` does not work; nothing was changed.
        """
        started = now()
        rows = [r for r in self._rows() if r.destroyed is None]
        try:
            renewed = [rewrap_row(row, old, new) for row in rows]
        except DecryptionError:
            raise ServerError("a tenant's key does not open under the root key in use; nothing was changed") from None

        def write(tx: Transaction) -> None:
            there = [KeyRow(**v) for v in tenant_key_rows.all_versions(tx)]
            if [r for r in there if r.destroyed is None] != rows:
                raise ServerError("the keys changed meanwhile; stop the server and try again")
            for row in renewed:
                tenant_key_rows.replace_wrapped(tx, row.tenant, row.version, row.wrapped)
            for tenant in sorted({r.tenant for r in rows}):
                AuditLog.insert(tx, tenant, _record("rewrap_root_key", started, ""))

        self.db.write(write)
        self.db.forget_deleted()
        return len(rows)

    def _renew_artifacts(self, tenant: str, renewed: Renewed) -> None:
        for artifact_id, key_id in self.vault.owned(tenant):
            if key_id == renewed.key_id:
                continue
            try:
                self.vault.rewrap(tenant=tenant, artifact_id=artifact_id)
            except InvalidRequestError:
                if self.vault.exists(artifact_id):
                    renewed.damaged.append(artifact_id)
                continue  # otherwise a running server deleted it meanwhile
            renewed.artifacts += 1
        self.db.write(lambda tx: artifact_rows.set_key_ids(tx, tenant, renewed.key_id, but=renewed.damaged))

    def _renew_values(self, tenant: str, column: SealedColumn) -> int:
        count, last = 0, ""
        while page := self.db.read(_page_reader(column, tenant, last)):
            last, changes = page[-1][0], []
            for context, stored in page:
                sealed = base64.b64decode(stored) if column.is_text else bytes(stored)
                if self.keyring.is_newest(tenant, sealed):
                    continue
                plain = self.keyring.open_value(tenant, column.purpose, sealed, context.encode())
                anew: Any = self.keyring.seal_value(tenant, column.purpose, plain, context.encode())
                changes.append((context, stored, base64.b64encode(anew).decode() if column.is_text else anew))
            if changes:
                self.db.write(_value_updates(column, tenant, changes))
            count += len(changes)
        return count

    def _rows(self) -> list[KeyRow]:
        return [KeyRow(**v) for v in self.db.read(tenant_key_rows.all_versions)]

    def require(self, tenant: str) -> None:
        """Refuse a tenant without keys.

        Raises:
            InvalidRequestError: there is none of that name, or its keys were destroyed.
        """
        if tenant not in self.tenants():
            raise InvalidRequestError(
                f"there is no tenant {tenant!r} with keys; `tg-tinker keys show` lists them",
                field="tenant",
                constraint="an existing one",
            )


def _record(operation: str, started: datetime, key_id: str) -> AuditRecord:
    return AuditRecord(
        operation=operation,
        run_id="",
        request_hash="",
        request_bytes=0,
        artifact_ids=(),
        started=started,
        completed=now(),
        success=True,
        error_code="",
        dp_metrics=None,
        actor=OPERATOR,
        facts={"key_id": key_id} if key_id else {},
    )


def _store_update(row: dataset_rows.StoreRow, key_id: str, wrapped: bytes) -> Callable[[Transaction], None]:
    def write(tx: Transaction) -> None:
        # Only if the data was not deleted meanwhile: a destroyed key does not come back.
        if any(r.upload_id == row.upload_id for r in dataset_rows.wrapped_keys(tx, row.tenant)):
            dataset_rows.update_store(tx, row.tenant, row.upload_id, key_id=key_id, wrapped_key=wrapped)

    return write


def _page_reader(column: SealedColumn, tenant: str, last: str) -> Callable[[Transaction], list[tuple[str, Any]]]:
    return lambda tx: sealed_rows.page_after(tx, column, tenant, last)


def _value_updates(
    column: SealedColumn, tenant: str, changes: list[tuple[str, Any, Any]]
) -> Callable[[Transaction], None]:
    def write(tx: Transaction) -> None:
        for context, old, new in changes:
            sealed_rows.replace(tx, column, tenant, context, old, new)

    return write

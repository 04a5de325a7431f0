"""What the server and the key commands share: database, keys, ciphertexts. Needs no model and no torch."""

from __future__ import annotations

import fcntl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from tg_tinker.errors import InvalidRequestError
from tg_tinker_server.artifacts.blobs import LocalBlobs
from tg_tinker_server.artifacts.vault import Vault
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.crypto import api_keys
from tg_tinker_server.crypto.envelope import TenantKeyring
from tg_tinker_server.crypto.keys import create_key_file, key_provider
from tg_tinker_server.service.caller import check_roles
from tg_tinker_server.service.policy import KeyPolicy
from tg_tinker_server.service.tenant_keys import StoredKeyRows
from tg_tinker_server.store import key_rows
from tg_tinker_server.store.database import Database

SYSTEM_TENANT = "_server"
DEFAULT_ROLES = ("trainer", "exporter", "auditor")


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class KeyDesk:
    """Creates, lists and revokes API keys. Used on the server's machine only."""

    db: Database
    keyring: TenantKeyring
    pepper: bytes

    def mint(
        self,
        tenant: str,
        roles: tuple[str, ...] = DEFAULT_ROLES,
        label: str = "",
        *,
        policy: KeyPolicy | None = None,
    ) -> str:
        """Create a key and return its text, which is stored nowhere; a policy is all that it may see and do."""
        check_roles(roles)
        if not tenant or tenant == SYSTEM_TENANT:
            raise InvalidRequestError("name a tenant", field="tenant", constraint="not empty")
        self.keyring.ensure(tenant)
        key = api_keys.mint()
        row = key_rows.ApiKeyRow(
            key_id=key.key_id,
            tenant=tenant,
            roles=roles,
            mac=api_keys.mac(key, self.pepper),
            created=_now(),
            revoked=None,
            label=label,
            policy=None if policy is None else policy.to_json(),
        )
        self.db.write(lambda tx: key_rows.insert_api_key(tx, row))
        return key.text

    def list(self) -> list[key_rows.ApiKeyRow]:
        """All keys, oldest first."""
        return self.db.read(key_rows.list_api_keys)

    def revoke(self, key_id: str) -> bool:
        """Revoke a key; running servers obey within a second."""
        return self.db.write(lambda tx: key_rows.revoke_api_key(tx, key_id, _now()))


@dataclass(frozen=True, slots=True)
class Foundation:
    """One data folder, opened."""

    db: Database
    keyring: TenantKeyring
    vault: Vault
    desk: KeyDesk

    def lock(self, config: ServerConfig) -> list[IO[bytes]]:
        """Take database and artifacts for one server; held until the files are closed or the process ends.

        Raises:
            InvalidRequestError: another server has one of them, and would sweep away what this one is writing.
        """
        artifacts = config.resolved_artifacts_dir.resolve()
        database = Path(config.resolved_database_url.removeprefix("sqlite:///")).resolve()
        held: list[IO[bytes]] = []
        for path in (artifacts, database):
            file = path.with_name(path.name + ".lock").open("ab")
            held.append(file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as e:
                for taken in held:
                    taken.close()
                raise InvalidRequestError(
                    f"another server uses {path}; stop it, or choose another data_dir",
                    field="data_dir",
                    constraint="one server per database and artifacts folder",
                ) from e
        return held

    @classmethod
    def open(cls, config: ServerConfig) -> Foundation:
        """Open the data folder, making it on first use."""
        try:
            config.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as e:
            raise InvalidRequestError(
                f"cannot use {config.data_dir} as data folder: {e.strerror}", field="data_dir", constraint="a folder"
            ) from e
        if not config.database_url:  # SQLite gives its side files the permissions of the first
            (config.data_dir / "tg-tinker.db").touch(mode=0o600)
        db = Database.open(config.resolved_database_url)
        key_file = config.data_dir / "root.key"
        if not config.root_key and not key_file.exists() and not db.read(key_rows.list_api_keys):
            create_key_file(key_file)  # first use of this folder; a lost key file is never replaced
        keyring = TenantKeyring(key_provider(config.resolved_root_key), StoredKeyRows(db))
        keyring.ensure(SYSTEM_TENANT)
        vault = Vault(LocalBlobs(config.resolved_artifacts_dir), keyring)
        desk = KeyDesk(db, keyring, keyring.mac_key(SYSTEM_TENANT, "api-key-pepper"))
        return cls(db, keyring, vault, desk)

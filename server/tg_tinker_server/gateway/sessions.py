"""Sessions: what a client opens first. All other ids begin with the session's, which cannot be guessed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from tg_tinker.errors import InvalidRequestError
from tg_tinker_server.crypto.envelope import TenantKeyring
from tg_tinker_server.gateway import names
from tg_tinker_server.gateway.messages import CreateSession
from tg_tinker_server.service.caller import Caller
from tg_tinker_server.service.durability import now
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.store import gateway_rows
from tg_tinker_server.store.database import Database
from tg_tinker_server.store.gateway_rows import SessionRow

PURPOSE = "tinker-session"
MAX_ABOUT_BYTES = 2**16


@dataclass(frozen=True, slots=True)
class Sessions:
    """Sessions of all tenants. What users say about them lies sealed under the tenant's key."""

    db: Database
    keyring: TenantKeyring
    executors: Executors
    _known: dict[tuple[str, str], SessionRow] = field(default_factory=dict)

    async def create(self, caller: Caller, about: CreateSession) -> str:
        """Open a session and return its id."""
        session_id = names.new_session()
        plain = json.dumps(about.model_dump(exclude_none=True)).encode()
        if len(plain) > MAX_ABOUT_BYTES:
            raise InvalidRequestError(
                f"tags and user_metadata have over {MAX_ABOUT_BYTES} bytes", field="user_metadata", constraint="short"
            )

        def write() -> SessionRow:
            row = SessionRow(
                tenant=caller.tenant,
                session_id=session_id,
                key_id=caller.key_id,
                sealed=self.keyring.seal_value(caller.tenant, PURPOSE, plain, session_id.encode()),
                created=now(),
                finished=None,
            )
            self.db.write(lambda tx: gateway_rows.insert_session(tx, row))
            return row

        self._known[(caller.tenant, session_id)] = await self.executors.io(write)
        return session_id

    async def get(self, caller: Caller, session_id: str) -> SessionRow:
        """A session that this caller may use.

        Raises:
            ResourceNotFoundError: there is none; one answer also for another tenant's.
        """
        row = self._known.get((caller.tenant, session_id))
        if row is None:
            row = await self.executors.io(
                self.db.read, lambda tx: gateway_rows.get_session(tx, caller.tenant, session_id)
            )
        # A key with a policy is one party's: what another key of the tenant calls its sessions is not for it.
        if row is None or (caller.policy is not None and row.key_id != caller.key_id):
            raise names.not_found("session", session_id)
        if len(self._known) > 10_000:
            self._known.clear()
        self._known[(caller.tenant, session_id)] = row
        return row

    async def about(self, caller: Caller, session_id: str) -> dict[str, Any]:
        """What its user said about a session."""
        row = await self.get(caller, session_id)
        plain = await self.executors.io(
            self.keyring.open_value, caller.tenant, PURPOSE, row.sealed, session_id.encode()
        )
        value: dict[str, Any] = json.loads(plain)
        return value

    async def list(self, caller: Caller, *, limit: int, offset: int) -> tuple[list[str], int]:
        """Ids, newest first, and how many there are."""
        key_id = caller.key_id if caller.policy is not None else None
        return await self.executors.io(
            self.db.read,
            lambda tx: gateway_rows.list_sessions(tx, caller.tenant, key_id, limit=limit, offset=offset),
        )

    async def finish(self, caller: Caller, session_id: str) -> None:
        """Note that a session is over. Its models stay: their user may come back for checkpoints."""
        await self.get(caller, session_id)
        await self.executors.io(
            self.db.write, lambda tx: gateway_rows.finish_session(tx, caller.tenant, session_id, now())
        )
        self._known.pop((caller.tenant, session_id), None)

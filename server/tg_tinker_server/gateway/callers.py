"""On whose behalf the server goes on after a restart with what a key had sent before."""

from __future__ import annotations

from dataclasses import dataclass

from tg_tinker.errors import AuthorizationError
from tg_tinker_server.service.caller import Caller, caller_of
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.store import key_rows
from tg_tinker_server.store.database import Database


@dataclass(frozen=True, slots=True)
class Callers:
    """Callers made of key ids that were verified when their requests were acknowledged."""

    db: Database
    executors: Executors

    async def of(self, tenant: str, key_id: str) -> Caller:
        """The caller that a key stands for, with its policy. A key revoked since still ends what it began.

        Raises:
            AuthorizationError: nothing is known of the key: it may have had a policy.
        """
        row = await self.executors.io(self.db.read, lambda tx: key_rows.get_api_key(tx, key_id))
        if row is None or row.tenant != tenant:
            raise AuthorizationError("the key that sent this is not known any more; send it again with another")
        return caller_of(row)

    @staticmethod
    def server(tenant: str) -> Caller:
        """The server itself, for a tenant: only to find what is the tenant's."""
        return Caller(tenant=tenant, key_id="", scopes=frozenset())

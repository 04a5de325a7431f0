"""Requests that were acknowledged before their effect is durable: sealed on disk until it is.

A client of our own protocol keeps its requests until the server says that their effect survives, and sends them again
after a restart. Clients of the Tinker protocol do not; the server keeps them for these (docs/adr/0013).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from tg_tinker_server.crypto.envelope import TenantKeyring
from tg_tinker_server.service.durability import now
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.store import gateway_rows
from tg_tinker_server.store.database import Database, Transaction

PURPOSE = "tinker-request"
KEPT_DAYS = 7  # of a batch that its client never stepped


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One acknowledged request.

    Attributes:
        seq: its position; 0 is the request that makes the model.
        name: which request it is.
        body: as it arrived, or an encoding of it that never changes.
        actor: id of the key that sent it.
    """

    model_id: str
    seq: int
    name: str
    body: bytes
    actor: str

    @property
    def entry_id(self) -> str:
        """What its sealed body is bound to."""
        return f"{self.model_id}.{self.seq}"


@dataclass(frozen=True, slots=True)
class Journal:
    """Keeps requests, gives them back in order after a restart, and forgets them."""

    db: Database
    keyring: TenantKeyring
    executors: Executors

    async def keep(self, tenant: str, entry: Entry, *, durable: int = 0) -> None:
        """Return once the request is on disk: one transaction, shared with whoever writes at the same time.

        What stands at this position already stays. In the same transaction goes what became durable before.
        """

        def write() -> None:
            row = gateway_rows.RequestRow(
                tenant=tenant,
                model_id=entry.model_id,
                seq=entry.seq,
                entry_id=entry.entry_id,
                name=entry.name,
                actor=entry.actor,
                sealed=self.keyring.seal_value(tenant, PURPOSE, entry.body, entry.entry_id.encode()),
                created=now(),
            )

            def both(tx: Transaction) -> None:
                gateway_rows.drop_requests(tx, tenant, entry.model_id, upto=durable)
                gateway_rows.insert_request(tx, row)

            self.db.write(both)

        await self.executors.io(write)

    async def positions(self, tenant: str, model_id: str) -> list[int]:
        """Where something is kept for a model, in order."""
        return await self.executors.io(self.db.read, lambda tx: gateway_rows.request_positions(tx, tenant, model_id))

    async def entry(self, tenant: str, model_id: str, seq: int) -> Entry | None:
        """What is kept at a position. One at a time: a batch can be larger than memory."""

        def read() -> Entry | None:
            row = self.db.read(lambda tx: gateway_rows.get_request(tx, tenant, model_id, seq))
            if row is None:
                return None
            return Entry(
                model_id=row.model_id,
                seq=row.seq,
                name=row.name,
                body=self.keyring.open_value(tenant, PURPOSE, row.sealed, row.entry_id.encode()),
                actor=row.actor,
            )

        return await self.executors.io(read)

    async def models(self) -> list[tuple[str, str]]:
        """Tenant and model of everything that is kept."""
        return await self.executors.io(self.db.read, gateway_rows.waiting_models)

    async def forget_old(self) -> None:
        """Forget what nobody went on with; a client that comes back all the same hears that its batch is incomplete.

        Called at a start, before anything is resumed.
        """
        before = now() - timedelta(days=KEPT_DAYS)
        await self.executors.io(self.db.write, lambda tx: gateway_rows.forget_old(tx, before))

    def drop(self, tenant: str, model_id: str, *, upto: int = 0, seqs: tuple[int, ...] = ()) -> None:
        """Forget requests up to a position, and single ones; nobody waits for it.

        If that is lost, a restart finds them done already.
        """
        self.db.submit(lambda tx: gateway_rows.drop_requests(tx, tenant, model_id, upto=upto, seqs=seqs))

    def forget(self, tenant: str, model_id: str) -> None:
        """Forget everything of a model that is no more; nobody waits for it."""
        self.db.submit(lambda tx: gateway_rows.forget_model(tx, tenant, model_id))

"""Checkpoints and receipts for those who watch the log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tg_tinker.types.log import LogReceipt, LogState
from tg_tinker_server.ledger.log import TransparencyLog
from tg_tinker_server.ledger.reservation import Reservation
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.store.database import Database, Transaction

MAX_KNOWN = 64


@dataclass(frozen=True, slots=True)
class LogService:
    """What the transparency log shows."""

    db: Database
    log: TransparencyLog
    executors: Executors

    async def receipt(self, paid: Reservation, known_size: int) -> LogReceipt:
        """That a charge is in the log: proven in the tree that ends with it, and from what its payer knows."""

        def read(tx: Transaction) -> LogReceipt:
            tenant, index = paid.scope.tenant, paid.leaf.index
            return LogReceipt(
                entry_json=paid.leaf.entry.body_json(),
                leaf_index=index,
                inclusion=tuple(self.log.inclusion(tx, tenant, index, index + 1)),
                log=self._states(tx, tenant, [known_size], index + 1)[0],
            )

        return await self.executors.io(self.db.read, read)

    async def states(self, tenant: str, known_sizes: Sequence[int]) -> list[LogState]:
        """The log as it stands, proven from each of these sizes."""
        known = list(known_sizes)[:MAX_KNOWN] or [0]
        return await self.executors.io(self.db.read, lambda tx: self._states(tx, tenant, known, None))

    async def entries(self, tenant: str, start: int, count: int) -> Sequence[str]:
        """Canonical bodies of consecutive entries."""
        return await self.executors.io(self.db.read, lambda tx: self.log.leaves(tx, tenant, start, count))

    def _states(self, tx: Transaction, tenant: str, known: Sequence[int], size: int | None) -> list[LogState]:
        now = self.log.checkpoint(tx, tenant, size)
        return [
            LogState(
                checkpoint=now.note,
                verifier_key=now.verifier_key,
                known_size=k,
                # Who knows a larger tree has seen what this one does not hold; there is nothing to prove.
                consistency=tuple(self.log.consistency(tx, tenant, k, now.size)) if k <= now.size else (),
            )
            for k in known
        ]

"""The runs in memory: one copy of each, room for the next, and what ends there kept on disk first."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from tg_tinker.errors import InvalidRequestError, RateLimitedError
from tg_tinker_server.service.durability import Durability
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.service.run import ACTIVE, Run
from tg_tinker_server.store import run_rows
from tg_tinker_server.store.database import Database, Transaction

MAX_OPERATION_S = 600.0


@dataclass(frozen=True, slots=True)
class ResidentRuns:
    """Every run this server has in memory, by tenant and id, and the locks under which one comes and goes.

    Attributes:
        max_runs_per_tenant: how many of one tenant there may be.
    """

    db: Database
    durability: Durability
    executors: Executors
    max_runs_per_tenant: int
    _runs: dict[tuple[str, str], Run] = field(default_factory=dict)
    _locks: dict[tuple[str, str], asyncio.Lock] = field(default_factory=dict)

    def get(self, tenant: str, run_id: str) -> Run | None:
        """A run if it is in memory."""
        return self._runs.get((tenant, run_id))

    def add(self, run: Run) -> None:
        """Keep a run. The caller has made room for it and holds a lock."""
        self._runs[(run.tenant, run.run_id)] = run

    def lock(self, tenant: str, run_id: str = "") -> asyncio.Lock:
        """The lock of a run that may come into memory, or of a tenant, who makes one run at a time."""
        return self._locks.setdefault((tenant, run_id), asyncio.Lock())

    def drop_lock(self, tenant: str, run_id: str) -> None:
        """Forget the lock of a run that is in memory now: who waits for it finds the run."""
        self._locks.pop((tenant, run_id), None)

    async def make_room(self, tenant: str) -> None:
        """Forget idle completed runs of a tenant that were only looked at or sampled from.

        Raises:
            RateLimitedError: there are none.
        """
        mine = [r for (owner, _), r in self._runs.items() if owner == tenant]
        if len(mine) < self.max_runs_per_tenant:
            return
        busy = {key for key, lock in self._locks.items() if lock.locked()}
        idle = [r for r in mine if r.status != ACTIVE and r.lane.idle and (tenant, r.run_id) not in busy]
        if not idle:
            raise RateLimitedError(
                f"{len(mine)} training clients of this tenant are in memory; unload some", retry_after=30.0
            )
        run, key = idle[0], (tenant, idle[0].run_id)
        # Nobody holds this lock, so it is taken at once; who asks for the run meanwhile waits until it is put away.
        async with self._locks.setdefault(key, asyncio.Lock()):
            del self._runs[key]
            await run.lane.close(None)
            await self.executors.io(self._keep_outcomes, run)
            await self.executors.compute(run.session.close)

    async def end(self, tenant: str, run_id: str, write: Callable[[Transaction], None]) -> None:
        """Close the lane, write the row, then free the memory: until then nobody restores a second copy.

        Together with the row goes what came of every operation, those that were waiting included.
        """
        outcomes: Callable[[], list[run_rows.ResultRow]] = list
        run = self._runs.get((tenant, run_id))
        if run is not None:
            ended = InvalidRequestError(
                f"training client {run_id} was unloaded", field="training_client_id", constraint="active"
            )
            await run.lane.close(ended, grace_s=MAX_OPERATION_S)
            outcomes = self.durability.unkept_rows(run)

        def seal_and_write() -> None:
            rows = outcomes()
            self.db.write(lambda tx: write_all(tx, rows))

        def write_all(tx: Transaction, rows: list[run_rows.ResultRow]) -> None:
            run_rows.put_results(tx, rows)
            write(tx)

        try:
            await self.executors.io(seal_and_write)
        finally:  # also where the row could not be written: the next call restores the run from disk
            if run is not None and self._runs.pop((tenant, run_id), None) is not None:
                await self.executors.compute(run.session.close)

    async def close(self, grace_s: float) -> None:
        """Let running operations end; waiting ones are sent again by their clients."""
        await asyncio.gather(*(r.lane.close(None, grace_s=grace_s) for r in self._runs.values()))
        self._runs.clear()

    def _keep_outcomes(self, run: Run) -> None:
        """Its client need not send again what ended only in memory, and would not: the server is the same."""
        rows = self.durability.unkept_rows(run)()
        self.db.write(lambda tx: run_rows.put_results(tx, rows))

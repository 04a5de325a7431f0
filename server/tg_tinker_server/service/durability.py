"""What survives a crash: after each settled step the run's state is on disk, encrypted, and the row points to it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import structlog

from tg_tinker.errors import TGTinkerError
from tg_tinker_server.artifacts.vault import Vault
from tg_tinker_server.crypto.envelope import TenantKeyring
from tg_tinker_server.engine.backend import EngineState
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.service.lanes import COMPLETED, FAILED, Operation
from tg_tinker_server.service.results import result_from_bytes, result_to_bytes
from tg_tinker_server.service.run import BROKEN, Run
from tg_tinker_server.store import run_rows
from tg_tinker_server.store.database import Database, Transaction

log = structlog.get_logger()
STATE = "state"
CHECKPOINT = "checkpoint"


def now() -> datetime:
    """The current time, aware, in UTC."""
    return datetime.now(UTC)


def new_id(prefix: str) -> str:
    """An unguessable id minted by the server."""
    return f"{prefix}_{secrets.token_hex(12)}"


@dataclass(frozen=True, slots=True)
class Durability:
    """Writes run state and operation results; reads them back after a restart."""

    db: Database
    vault: Vault
    keyring: TenantKeyring
    executors: Executors
    kept_results: int

    async def write_state(self, run: Run, engine: EngineState, *, step: int) -> str:
        """Seal a snapshot of the run; it counts only once a row points to it."""
        state_id = new_id("st")
        await self.executors.io(
            self.vault.seal,
            tenant=run.tenant,
            artifact_id=state_id,
            kind=STATE,
            tensors=engine.tensors,
            state={
                "engine": engine.scalars,
                "step": step,
                "run_id": run.run_id,
                "provenance": list(run.lineage),
            },
            hashed=False,
        )
        return state_id

    async def read_state(self, tenant: str, state_id: str) -> tuple[EngineState, Mapping[str, Any]]:
        """Open a snapshot, verified to its end."""
        opened = await self.executors.io(self.vault.open, tenant=tenant, artifact_id=state_id, kind=STATE)
        return EngineState(tensors=opened.tensors, scalars=opened.state["engine"]), opened.state

    async def rewind(self, run: Run) -> None:
        """Go back to the last durable weights after an operation failed half-way.

        If even that fails the run is set aside as failed: nobody trains on, samples or saves weights that were
        never settled. A restarted server begins again from the last durable state.
        """
        try:
            engine, _ = await self.read_state(run.tenant, run.state_id)
            await self.executors.compute(run.session.import_state, engine, optimizer=True)
        except Exception:
            run.status = BROKEN
            raise

    async def advance(
        self,
        run: Run,
        operation: Operation,
        result: Any,
        *,
        state_id: str,
        step: int,
        status: str,
        settle: Callable[[Transaction], None] | None = None,
        error: TGTinkerError | None = None,
    ) -> None:
        """Make one operation that ended a logical batch durable, in one transaction.

        The row of the run moves to the new snapshot, the charge is settled, and the outcomes of every
        operation up to this one are kept. Either all of it happens or none. With an ``error`` the batch was
        dropped and the snapshot is the old one.
        """
        kept = [(o, o.status, o.result, o.error) for o in run.lane.unstored(operation.seq)]
        kept.append((operation, FAILED if error else COMPLETED, result, error))

        def seal_and_write() -> None:
            rows = [self._row(run, *k) for k in kept]
            self.db.write(lambda tx: write(tx, rows))

        def write(tx: Transaction, rows: list[run_rows.ResultRow]) -> None:
            if settle is not None:
                settle(tx)
            run_rows.update_run(
                tx,
                run.tenant,
                run.run_id,
                step=step,
                status=status,
                durable_seq=operation.seq,
                state_artifact_id=state_id,
                updated=now(),
            )
            run_rows.put_results(tx, rows)
            run_rows.prune_results(tx, run.tenant, run.run_id, upto=operation.seq - self.kept_results)

        await self.executors.io(seal_and_write)
        old, run.state_id = run.state_id, state_id
        run.step, run.durable_seq = step, operation.seq
        if run.status != BROKEN:  # the row is sound, what is in memory is not
            run.status = status
        for ended, *_ in kept:
            ended.stored = True
        run.lane.forget(operation.seq)
        if old and old != state_id:
            self.executors.io_later(self.delete_state, run.tenant, old)

    def delete_state(self, tenant: str, state_id: str) -> None:
        """Delete a snapshot that no row points to any more."""
        try:
            self.vault.delete(tenant=tenant, artifact_id=state_id)
        except Exception:  # noqa: BLE001
            # The step is durable already and must not fail for this; the sweep at the next start deletes it.
            log.warning("old_state_not_deleted", state_id=state_id)

    async def keep_result(
        self,
        run: Run,
        operation: Operation,
        result: Any,
        *,
        also: Callable[[Transaction], None] | None = None,
        error: TGTinkerError | None = None,
    ) -> None:
        """Make the outcome of an operation durable, together with rows it wrote; it is not executed again."""
        status = FAILED if error else COMPLETED

        def seal_and_write() -> None:
            row = self._row(run, operation, status, result, error)
            self.db.write(lambda tx: write(tx, row))

        def write(tx: Transaction, row: run_rows.ResultRow) -> None:
            if also is not None:
                also(tx)
            run_rows.put_results(tx, [row])
            run_rows.prune_results(tx, run.tenant, run.run_id, upto=operation.seq - self.kept_results)

        await self.executors.io(seal_and_write)
        operation.stored = True
        run.lane.forget(operation.seq)

    def unkept_rows(self, run: Run) -> Callable[[], list[run_rows.ResultRow]]:
        """What ended and is not kept yet, as of now; sealed when called, which takes time."""
        ended = [(o, o.status, o.result, o.error) for o in run.lane.unstored(run.lane.highest)]
        return lambda: [self._row(run, *e) for e in ended]

    def operation_from_row(self, row: run_rows.ResultRow) -> Operation:
        """An ended operation as it was kept."""
        plain = self.keyring.open_value(row.tenant, "result", row.sealed, row.future_id.encode())
        result, error = result_from_bytes(plain)
        operation = Operation(row.run_id, row.seq, row.operation, row.request_mac, stored=True)
        operation.finish(row.status, result=result, error=error)
        return operation

    def _row(
        self, run: Run, operation: Operation, status: str, result: Any, error: TGTinkerError | None
    ) -> run_rows.ResultRow:
        plain = result_to_bytes(result, error)
        return run_rows.ResultRow(
            tenant=run.tenant,
            run_id=run.run_id,
            seq=operation.seq,
            operation=operation.name,
            request_mac=operation.digest,
            status=status,
            sealed=self.keyring.seal_value(run.tenant, "result", plain, operation.future_id.encode()),
            future_id=operation.future_id,
            created=now(),
        )

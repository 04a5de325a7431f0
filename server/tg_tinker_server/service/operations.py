"""From a submitted call to its future: idempotent on (run, sequence), ordered by the lane, noted in the audit log."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from tg_tinker.errors import (
    FutureCancelledError,
    InvalidRequestError,
    ResourceNotFoundError,
    ServerError,
    TGTinkerError,
)
from tg_tinker_server.ledger.audit import AuditLog, AuditRecord
from tg_tinker_server.service.caller import Caller
from tg_tinker_server.service.durability import Durability, now
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.service.lanes import Operation, parse_future_id
from tg_tinker_server.service.run import Run
from tg_tinker_server.service.runs import RunRegistry
from tg_tinker_server.store import run_rows
from tg_tinker_server.store.database import Database

MAX_WAIT_S = 60.0
LARGE_PAYLOAD = 1 << 18  # bytes from which hashing leaves the event loop


@dataclass(frozen=True, slots=True)
class OperationService:
    """Submitting, awaiting and cancelling operations."""

    db: Database
    registry: RunRegistry
    durability: Durability
    audit: AuditLog
    executors: Executors
    epoch: str = field(default_factory=lambda: secrets.token_hex(8))
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    unhealthy: asyncio.Event = field(default_factory=asyncio.Event)

    async def submit(
        self,
        run: Run,
        seq: int,
        name: str,
        payload: bytes,
        work: Callable[[Operation], Awaitable[Any]],
        *,
        effect: bool,
        actor: str = "",
    ) -> Operation:
        """Queue a call at its position, or find the operation that already stands there.

        Raises:
            InvalidRequestError: the position is taken by another request, or is not a position.
            RateLimitedError: the queue is full.
        """
        self.refuse_when_stopping()
        if seq < 1:
            raise InvalidRequestError("sequence numbers start at 1", field="seq", constraint="contiguous from 1")
        digest = await self._digest(run, name, payload)
        operation = Operation(
            run.run_id,
            seq,
            name,
            digest,
            actor=actor,
            request_bytes=len(payload),
            effect=effect,
            work=self._noted(run, work),
        )
        if seq < run.lane.expected and run.lane.get(seq) is None:
            kept = await self._kept(run.tenant, run.run_id, seq)
            if kept is not None:
                if kept.digest != digest:
                    raise InvalidRequestError(
                        f"sequence number {seq} of {run.run_id} was used by a different request",
                        field="seq",
                        constraint="one request per sequence number",
                    )
                return kept
        return run.lane.submit(operation)

    async def _digest(self, run: Run, name: str, payload: bytes) -> bytes:
        data = name.encode() + b"\x00" + payload
        if len(payload) < LARGE_PAYLOAD:
            return run.mac("request", data)
        return await self.executors.io(run.mac, "request", data)

    async def resume(self, run: Run, finished: Sequence[int]) -> int:
        """After a restart: skip what ended for good; returns the next position to execute."""
        run.lane.skip(finished)
        return run.lane.expected

    async def find(self, caller: Caller, run_id: str, seq: int) -> tuple[Run, Operation | None]:
        """The operation at a position of a run; ``None`` if this process never received it."""
        tenant = caller.tenant
        run = await self.registry.get(caller, run_id)
        operation = run.lane.get(seq)
        if operation is None and seq < run.lane.expected:
            operation = await self._kept(tenant, run_id, seq)
            if operation is None:
                raise ResourceNotFoundError(
                    "the result is no longer kept", resource_type="future", resource_id=f"{run_id}.{seq}"
                )
        return run, operation

    async def find_by_id(self, caller: Caller, future_id: str) -> tuple[Run, Operation | None]:
        """The same by public id; a foreign or impossible id gives the same answer as a missing one."""
        position = parse_future_id(future_id)
        if position is not None:
            with contextlib.suppress(ResourceNotFoundError):
                return await self.find(caller, *position)
        raise ResourceNotFoundError("no such future for this tenant", resource_type="future", resource_id=future_id)

    async def wait(self, operation: Operation, wait_s: float) -> None:
        """Return when the operation has ended or the time is over; a push, not a poll.

        Raises:
            ServerError: the server stops; ask the next one.
        """
        if operation.ended.is_set() or not wait_s > 0:  # NaN waits for nothing
            return
        waits = [asyncio.ensure_future(e.wait()) for e in (operation.ended, self.stopping)]
        try:
            await asyncio.wait(waits, timeout=min(wait_s, MAX_WAIT_S), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for waiting in waits:
                waiting.cancel()
        if not operation.ended.is_set():
            self.refuse_when_stopping()

    def refuse_when_stopping(self) -> None:
        """A stopping server takes nothing new; the transport of the client repeats the call by itself."""
        if self.stopping.is_set():
            raise ServerError("the server is shutting down; the call is safe to repeat", details={"retry": True})

    async def _kept(self, tenant: str, run_id: str, seq: int) -> Operation | None:
        row = await self.executors.io(self.db.read, lambda tx: run_rows.get_result(tx, tenant, run_id, seq))
        return self.durability.operation_from_row(row) if row else None

    def _noted(self, run: Run, work: Callable[[Operation], Awaitable[Any]]) -> Callable[[Operation], Awaitable[Any]]:
        async def noted(operation: Operation) -> Any:
            self._require_health()
            started = now()
            try:
                result = await work(operation)
                await self._keep(run, operation, result, None)
            except FutureCancelledError as e:
                self._note(run, operation, started, None, e.code)
                raise
            except TGTinkerError as e:
                await self._keep(run, operation, None, e)
                self._note(run, operation, started, None, e.code)
                raise
            except Exception:
                self._note(run, operation, started, None, ServerError.code)
                raise
            self._note(run, operation, started, result, "")
            return result

        return noted

    async def _keep(self, run: Run, operation: Operation, result: Any, error: TGTinkerError | None) -> None:
        """Make what had no effect on weights durable at once; the rest becomes so with its step."""
        if operation.effect or operation.stored:
            return
        operation.commit()
        await self.durability.keep_result(run, operation, result, error=error)

    def _require_health(self) -> None:
        """An audit log that cannot be written stops the request."""
        try:
            self.db.check_healthy()
        except ServerError:
            self.unhealthy.set()
            raise

    def _note(self, run: Run, operation: Operation, started: datetime, result: Any, code: str) -> None:
        dp = getattr(result, "dp_metrics", None)
        artifact = getattr(result, "artifact_id", None)
        self.audit.append(
            run.tenant,
            AuditRecord(
                operation=operation.name,
                run_id=run.run_id,
                request_hash="hmac-sha256:" + operation.digest.hex(),
                # How many records a private batch held is itself private.
                request_bytes=0 if run.private is not None else operation.request_bytes,
                artifact_ids=(artifact,) if artifact else (),
                started=started,
                completed=now(),
                success=not code,
                error_code=code,
                actor=operation.actor,
                dp_metrics=None
                if dp is None
                else {
                    "noise_applied": dp.noise_applied,
                    "epsilon_spent": repr(dp.epsilon_spent),
                    "total_epsilon": repr(dp.total_epsilon),
                    "delta": repr(dp.delta),
                },
            ),
        )

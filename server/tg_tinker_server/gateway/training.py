"""Training operations: kept on disk, put into the run's lane at the place their number says, then acknowledged."""

from __future__ import annotations

import asyncio
import weakref
from dataclasses import dataclass, field

import structlog

from tg_tinker.errors import InvalidRequestError, TGTinkerError
from tg_tinker_server.gateway.callers import Callers
from tg_tinker_server.gateway.calls import CallReader, TrainingRequest, kept_request
from tg_tinker_server.gateway.models import Models
from tg_tinker_server.service.caller import Caller
from tg_tinker_server.service.dispatch import Dispatch
from tg_tinker_server.service.journal import Entry, Journal
from tg_tinker_server.service.lanes import CANCELLED, Operation
from tg_tinker_server.service.operations import OperationService
from tg_tinker_server.service.run import ACTIVE, Run
from tg_tinker_server.service.training import TrainingService

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Training:
    """Queues training operations, across restarts.

    Attributes:
        gap_s: how long later requests wait for a number that does not arrive.
    """

    models: Models
    dispatch: Dispatch
    operations: OperationService
    training: TrainingService
    journal: Journal
    callers: Callers
    gap_s: float
    reader: CallReader = field(default_factory=CallReader)
    _resumed: weakref.WeakSet[Run] = field(default_factory=weakref.WeakSet)
    _locks: dict[tuple[str, str], asyncio.Lock] = field(default_factory=dict)
    _entering: dict[tuple[str, str, int], asyncio.Event] = field(default_factory=dict)
    _watching: set[asyncio.Task[None]] = field(default_factory=set)

    async def run(self, caller: Caller, model_id: str) -> Run:
        """The run behind a model; what it had acknowledged before a restart is queued before anything new."""
        run = await self.models.run(caller, model_id)
        if run not in self._resumed:
            async with self._locks.setdefault((caller.tenant, model_id), asyncio.Lock()):
                if run not in self._resumed:
                    await self._resume(run, model_id)
                    self._resumed.add(run)
        return run

    async def submit(self, caller: Caller, request: TrainingRequest) -> Operation:
        """Queue a request at its number, or find the operation that it made already.

        Raises:
            ResourceNotFoundError: no such model.
            InvalidRequestError: the number was used by another request, or is far away.
            RateLimitedError: too many wait.
        """
        self.operations.refuse_when_stopping()
        run = await self.run(caller, request.model_id)
        key = (caller.tenant, request.model_id, request.seq)
        while (before := self._entering.get(key)) is not None:  # the first of two equal requests goes first
            await before.wait()
        if request.seq < run.lane.expected or run.lane.get(request.seq) is not None:
            return await self._dispatch(caller, run, request)
        entered = self._entering[key] = asyncio.Event()
        try:
            entry = Entry(
                model_id=request.model_id,
                seq=request.seq,
                name=request.name,
                body=request.body,
                actor=caller.key_id,
            )
            await self.journal.keep(caller.tenant, entry, durable=run.durable_seq)
            try:
                return await self._dispatch(caller, run, request)
            except TGTinkerError:
                self.journal.drop(caller.tenant, request.model_id, seqs=(request.seq,))
                raise
        finally:
            del self._entering[key]
            entered.set()

    async def resume_all(self) -> None:
        """Go on with everything that was acknowledged before a restart, and was not left lying for too long."""
        await self.journal.forget_old()
        for tenant, model_id in await self.journal.models():
            try:
                for entry in await self.journal.entries(tenant, model_id):
                    if entry.seq == 0:
                        await self.models.resume(await self.callers.of(tenant, entry.actor), entry)
                await self.run(self.callers.server(tenant), model_id)
            except TGTinkerError as e:
                log.warning("request_not_resumed", error=e.code)
                if e.code == "RESOURCE_NOT_FOUND":
                    self.journal.forget(tenant, model_id)

    async def _resume(self, run: Run, model_id: str) -> None:
        run.lane.patience_s = self.gap_s
        run.lane.on_given_up = lambda missing: self._given_up(run, missing)
        entries = [e for e in await self.journal.entries(run.tenant, model_id) if e.seq > 0]
        done = [e.seq for e in entries if e.seq <= run.durable_seq]
        if done:
            self.journal.drop(run.tenant, model_id, upto=run.durable_seq)
        for entry in entries[len(done) :]:
            caller = await self.callers.of(run.tenant, entry.actor)
            try:
                await self._dispatch(caller, run, kept_request(entry.name, model_id, entry.seq, entry.body))
            except TGTinkerError as e:
                log.warning("request_not_resumed", error=e.code)
        if run.status != ACTIVE:  # nothing of it can be done any more
            self.journal.forget(run.tenant, model_id)

    async def _dispatch(self, caller: Caller, run: Run, request: TrainingRequest) -> Operation:
        operation = await self.dispatch.submit(
            caller,
            run,
            request.seq,
            request.operation,
            request.name.encode() + b"\x00" + request.body,
            lambda: self.reader.read(caller, run, request),
            effect=self.reader.has_effect(request),
        )
        watching = asyncio.create_task(self._forget_when_durable(run, request.model_id, operation))
        self._watching.add(watching)
        watching.add_done_callback(self._watching.discard)
        return operation

    async def _forget_when_durable(self, run: Run, model_id: str, operation: Operation) -> None:
        await operation.ended.wait()
        over = operation.stored or operation.status == CANCELLED
        if over:  # a step takes all before it along
            self.journal.drop(run.tenant, model_id, upto=run.durable_seq, seqs=(operation.seq,))

    def _given_up(self, run: Run, missing: Operation) -> None:
        assert missing.error is not None
        self.training.poison(run, InvalidRequestError(missing.error.message, field="seq_id", constraint="contiguous"))

    async def find(self, caller: Caller, model_id: str, seq: int) -> tuple[Run, Operation | None]:
        """The operation at a position; ``None``: no such request was acknowledged."""
        run = await self.run(caller, model_id)
        operation = run.lane.get(seq)
        if operation is None:
            _, operation = await self.operations.find(caller, run.run_id, seq)
        return run, operation

    async def close(self) -> None:
        """Stop watching."""
        for task in list(self._watching):
            task.cancel()

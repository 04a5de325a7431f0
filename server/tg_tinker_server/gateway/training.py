"""Training operations: kept on disk, put into the run's lane at the place their number says, then acknowledged."""

from __future__ import annotations

import asyncio
import weakref
from dataclasses import dataclass, field

import structlog

from tg_tinker.errors import InvalidRequestError, RateLimitedError, ServerError, TGTinkerError
from tg_tinker_server.gateway.callers import Callers
from tg_tinker_server.gateway.calls import CallReader, TrainingRequest, kept_request
from tg_tinker_server.gateway.models import Models
from tg_tinker_server.service.caller import Caller
from tg_tinker_server.service.dispatch import Dispatch
from tg_tinker_server.service.journal import Entry, Journal
from tg_tinker_server.service.lanes import CANCELLED, NEAR, Operation
from tg_tinker_server.service.operations import OperationService
from tg_tinker_server.service.run import ACTIVE, Run
from tg_tinker_server.service.training import TrainingService

log = structlog.get_logger()
RESUME_WAIT_S = 20.0  # of one call, for what stands before it; then its client asks again


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
    _resuming: weakref.WeakKeyDictionary[Run, asyncio.Task[None]] = field(default_factory=weakref.WeakKeyDictionary)
    _entering: dict[tuple[str, str, int], asyncio.Event] = field(default_factory=dict)
    _watching: set[asyncio.Task[None]] = field(default_factory=set)

    async def run(self, caller: Caller, model_id: str) -> Run:
        """The run behind a model; what it had acknowledged before a restart is queued before anything new.

        Raises:
            RateLimitedError: that is more than fits into the queue at once, and takes its time.
        """
        run = await self.models.run(caller, model_id)
        resuming = self._resume_once(run, model_id)
        if not resuming.done():
            await asyncio.wait({resuming}, timeout=RESUME_WAIT_S)
        if not resuming.done():
            raise RateLimitedError(
                "the server goes on with what this model had acknowledged before a restart; ask again",
                retry_after=5.0,
            )
        await resuming
        return run

    def _resume_once(self, run: Run, model_id: str) -> asyncio.Task[None]:
        resuming = self._resuming.get(run)
        failed = resuming is not None and resuming.done() and (resuming.cancelled() or resuming.exception())
        if resuming is None or failed:
            resuming = asyncio.create_task(self._resume(run, model_id), name=f"resume-{model_id}")
            resuming.add_done_callback(lambda t: t.cancelled() or t.exception())  # asked for by calls, or never
            self._resuming[run] = resuming
        return resuming

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
                creation = await self.journal.entry(tenant, model_id, 0)
                if creation is not None:
                    await self.models.resume(await self.callers.of(tenant, creation.actor), creation)
                self._resume_once(await self.models.run(self.callers.server(tenant), model_id), model_id)
            except TGTinkerError as e:
                log.warning("request_not_resumed", error=e.code)
                if e.code == "RESOURCE_NOT_FOUND":
                    self.journal.forget(tenant, model_id)

    async def _resume(self, run: Run, model_id: str) -> None:
        run.lane.patience_s = self.gap_s
        run.lane.on_given_up = lambda missing: self._given_up(run, missing)
        positions = [seq for seq in await self.journal.positions(run.tenant, model_id) if seq > 0]
        if positions and positions[0] <= run.durable_seq:
            self.journal.drop(run.tenant, model_id, upto=run.durable_seq)
        for seq in positions:
            if seq > run.durable_seq:
                await self._resume_one(run, model_id, seq)
        if run.status != ACTIVE:  # nothing of it can be done any more
            self.journal.forget(run.tenant, model_id)

    async def _resume_one(self, run: Run, model_id: str, seq: int) -> None:
        """Queue what was acknowledged; where the queue is full, as soon as it is not."""
        entry = await self.journal.entry(run.tenant, model_id, seq)
        if entry is None:
            return
        request = kept_request(entry.name, model_id, seq, entry.body)
        while True:
            before = run.lane.next_pending
            try:
                await self._dispatch(await self.callers.of(run.tenant, entry.actor), run, request)
            except TGTinkerError as e:
                full = isinstance(e, RateLimitedError) or e.details.get("constraint") == NEAR
                if full and before is not None:
                    await before.ended.wait()
                    continue
                if isinstance(e, ServerError):  # it stops: the next one goes on
                    raise
                log.error("request_not_resumed", error=e.code)
            return

    async def _dispatch(self, caller: Caller, run: Run, request: TrainingRequest) -> Operation:
        operation = await self.dispatch.submit(
            caller,
            run,
            request.seq,
            request.operation,
            request.name.encode() + b"\x00" + request.body,
            lambda: self.reader.read(run, request),
            effect=self.reader.has_effect(request),
            finds_units=True,
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
        for task in [*self._watching, *self._resuming.values()]:
            task.cancel()


def sampler_seal(run: Run, seq: int, sampler_id: str) -> str:
    """What shows, in a request's id, that the request asked for this sampler: anybody who may read sends ids."""
    return run.mac("sampler", f"{seq}:{sampler_id}".encode()).hex()[:24]

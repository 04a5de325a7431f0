"""The one loop that all requests for samples share: slices on the compute thread while there is work."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog

from tg_tinker.errors import InvalidRequestError, ServerError, TGTinkerError
from tg_tinker.types.tokens import PromptFigures, SampleEvent, SampleQuery
from tg_tinker_server.engine.backend import Backend
from tg_tinker_server.engine.sampling.seam import Progress, SampledWeights, SamplingBackend, Ticket, TokenSampler
from tg_tinker_server.service.crashes import place_of
from tg_tinker_server.service.executors import Executors

log = structlog.get_logger()


@dataclass(eq=False, slots=True)
class _Request:
    """One request under way. The ticket belongs to the compute thread, the rest to the event loop.

    Attributes:
        unsettled: held while the weights are between two settled states.
        news: what came of it and, where it is shared, of those asked for with it.
    """

    weights: SampledWeights
    query: SampleQuery
    group: Hashable
    unsettled: asyncio.Lock | None = None
    news: asyncio.Queue[tuple[SampleEvent, ...] | Exception] = field(default_factory=asyncio.Queue)
    ticket: Ticket | None = None
    over: bool = False


class SamplingLoop:
    """Requests under way. A slice is one visit to the compute thread: training has its turn in between.

    Everything here happens on the event loop, the work on the compute thread.
    """

    def __init__(self, backend: Backend, executors: Executors) -> None:
        self._backend, self._executors = backend, executors
        self._inbox: list[_Request] = []
        self._leaving: list[_Request] = []
        self._live: dict[Ticket, _Request] = {}
        self._worker: asyncio.Task[None] | None = None
        self._sampler: TokenSampler | None = None  # of the compute thread
        self._closed = False
        self._arrived = asyncio.Event()

    def ensure_open(self) -> None:
        """Refuse what a stopping server would not finish.

        Raises:
            ServerError: it is stopping.
        """
        if self._closed:
            raise _stopping()

    async def slices(
        self,
        weights: SampledWeights,
        queries: Sequence[SampleQuery],
        group: Hashable,
        *,
        unsettled: asyncio.Lock | None = None,
    ) -> AsyncGenerator[tuple[SampleEvent, ...]]:
        """What each slice does for some requests with the same weights. Closing the generator takes them out of the
        model's batch.

        Args:
            group: who may be in one run through the model: requests with equal groups.
            unsettled: while it is held these weights go through no model.

        Raises:
            TGTinkerError: one of the requests failed; the others are given up.
        """
        self.ensure_open()
        if not isinstance(self._backend, SamplingBackend):
            raise InvalidRequestError(
                "the models of this server cannot be sampled", field="model_ref", constraint="another server"
            )
        news: asyncio.Queue[tuple[SampleEvent, ...] | Exception] = asyncio.Queue()
        requests = [_Request(weights, query, group, unsettled, news) for query in queries]
        left = len(requests)
        for request in requests:
            self._start(request)
        try:
            while left:
                new = await news.get()
                if isinstance(new, Exception):
                    raise new
                left -= isinstance(new[-1], PromptFigures)
                yield new
        finally:
            for request in requests:
                self._leave(request)

    async def put_away(self, weights: SampledWeights) -> None:
        """Close weights that no request uses any more, after those that left are out of the batch."""
        leaving, self._leaving = self._leaving, []
        await self._executors.compute(self._put_away, weights, leaving)
        self._forget(leaving)

    async def close(self) -> None:
        """End every request; return when the slice under way has ended."""
        self._closed = True
        self._arrived.set()
        self._fail_all(_stopping())
        if self._worker is not None:
            await asyncio.wait({self._worker})
        await self._close_sampler()

    async def _close_sampler(self) -> None:
        sampler, self._sampler = self._sampler, None
        if sampler is not None:
            await self._executors.compute(sampler.close)

    def _start(self, request: _Request) -> None:
        self._inbox.append(request)
        self._arrived.set()
        if self._worker is None:
            self._begin()

    def _begin(self) -> None:
        self._worker = asyncio.create_task(self._work(), name="samplers")

    def _leave(self, request: _Request) -> None:
        """Whoever leaves before the end frees its rows before the next slice."""
        if not request.over:
            request.over = True
            if request in self._inbox:
                self._inbox.remove(request)
            else:
                self._leaving.append(request)
                self._arrived.set()

    async def _work(self) -> None:
        inbox: list[_Request] = []
        try:
            while not self._closed and (self._inbox or self._live or self._leaving):
                resting = self._resting()
                if not self._leaving and all(r.weights in resting for r in (*self._inbox, *self._live.values())):
                    await self._wait_for_weights()
                    continue
                inbox, self._inbox = self._inbox, []
                leaving, self._leaving = self._leaving, []
                # Nothing was awaited since the look at the locks: a step that begins now waits behind this slice.
                for progress in await self._executors.compute(self._turn, inbox, leaving, resting):
                    self._tell(progress)
                self._forget(leaving)
                await asyncio.sleep(0)  # who asks next gets into the next slice
        except Exception as e:  # noqa: BLE001 - a defect of ours: nobody waits for ever
            log.error("sampling_crashed", error=type(e).__name__, at=place_of(e))
            self._inbox = [*(r for r in inbox if not r.over), *self._inbox]  # the turn may not have got to them
            self._fail_all(e)
            self._leaving.clear()  # of a sampler that is no more
            await self._close_sampler()
        finally:
            self._worker = None
            if self._closed:
                self._fail_all(_stopping())
            elif self._inbox:  # who came while the sampler was closed
                self._begin()

    def _resting(self) -> set[SampledWeights]:
        """Weights that are not settled just now."""
        under_way = (*self._inbox, *self._live.values())
        return {r.weights for r in under_way if r.unsettled is not None and r.unsettled.locked()}

    async def _wait_for_weights(self) -> None:
        """Until some weights are settled, or somebody comes or goes."""
        self._arrived.clear()
        locks = {r.unsettled for r in (*self._inbox, *self._live.values()) if r.unsettled is not None}
        tasks: list[asyncio.Future[Any]] = [asyncio.ensure_future(_settled(lock)) for lock in locks]
        tasks.append(asyncio.ensure_future(self._arrived.wait()))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    def _turn(self, inbox: list[_Request], leaving: list[_Request], resting: set[SampledWeights]) -> list[Progress]:
        """One visit to the compute thread."""
        self._cancel(leaving)
        if self._sampler is None:
            assert isinstance(self._backend, SamplingBackend)
            self._sampler = self._backend.token_sampler()
        refused = []
        for request in inbox:
            try:
                request.ticket = self._sampler.submit(request.weights, request.query, group=request.group)
            except Exception as e:  # noqa: BLE001 - told to whoever asked
                request.ticket = Ticket()
                refused.append(Progress(ticket=request.ticket, error=e))
            self._live[request.ticket] = request
        return [*refused, *self._sampler.step(resting)]

    def _cancel(self, leaving: list[_Request]) -> None:
        for request in leaving:
            if request.ticket is not None and self._sampler is not None:
                self._sampler.cancel(request.ticket)

    def _forget(self, left: list[_Request]) -> None:
        for request in left:
            if request.ticket is not None:
                self._live.pop(request.ticket, None)

    def _tell(self, progress: Progress) -> None:
        request = self._live.get(progress.ticket)
        if request is None:
            return
        if progress.events:
            request.news.put_nowait(progress.events)
        if progress.error is not None:
            request.news.put_nowait(_presentable(progress.error))
        if progress.error is not None or (progress.events and isinstance(progress.events[-1], PromptFigures)):
            request.over = True
            del self._live[progress.ticket]

    def _fail_all(self, error: Exception) -> None:
        for request in dict.fromkeys([*self._inbox, *self._live.values()]):
            request.over = True
            request.news.put_nowait(_presentable(error))
        self._inbox.clear()
        self._live.clear()

    def _put_away(self, weights: SampledWeights, leaving: list[_Request]) -> None:
        self._cancel(leaving)
        weights.close()


def _presentable(error: Exception) -> TGTinkerError:
    """An error as it may be shown; a defect of ours goes to the log, without its text."""
    if isinstance(error, TGTinkerError):
        return error
    reference = secrets.token_hex(6)
    log.error("sample_crashed", error=type(error).__name__, at=place_of(error), reference=reference)
    return ServerError(f"sampling failed inside the server (reference {reference})", details={"reference": reference})


async def _settled(lock: asyncio.Lock) -> None:
    async with lock:
        pass


def _stopping() -> ServerError:
    return ServerError("the server is stopping; send the request to the next one", details={"retry": True})

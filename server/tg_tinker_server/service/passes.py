"""Whose pass is computed next: passes under way take turns, one slice at a time, and may share a slice."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from tg_tinker_server.config import SharePasses
from tg_tinker_server.engine.backend import LossRequest, Pass, PassRequest, PassResult, Session
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.service.run import Run

LEAST_NOISE = 0.1  # as a multiplier; below it, what rounding carries over no longer drowns in the noise


def sharing_group(run: Run, share: SharePasses) -> Hashable | None:
    """Runs with the same answer may be in one pass; ``None`` is alone.

    How a number is rounded depends on who shares the pass. So whoever gets exact figures could read from their
    last digits how large the neighbours' batches were:

    * another tenant, unless the operator says that tenants trust each other;
    * whoever gets the model of a run without privacy. What a private run computes must not leave through it, so
      runs whose releases carry noise share among themselves, and a private run that may step without noise, or
      with next to none, shares with nobody.
    """
    private = run.private
    exact = private is not None and (private.config.allow_unnoised_steps or private.noise_multiplier < LEAST_NOISE)
    if share == "off" or exact:
        return None
    return ("everyone" if share == "everyone" else ("tenant", run.tenant), private is not None)


@dataclass(eq=False, slots=True)
class _Waiting:
    """One pass under way. ``work`` belongs to the compute thread, the rest to the event loop."""

    session: Session
    request: PassRequest | LossRequest
    group: Hashable | None
    ensure_wanted: Callable[[], None]
    outcome: asyncio.Future[PassResult]
    work: Pass | None = None


@dataclass(slots=True)
class _Turn:
    """What one visit to the compute thread did."""

    moved: list[_Waiting] = field(default_factory=list)
    ended: list[tuple[_Waiting, PassResult | Exception]] = field(default_factory=list)


class PassQueue:
    """All passes of a server under way, first come first served, one slice each per round.

    Whoever is at the head gets a slice and takes along those of its group that fit; all that moved go to the
    back. So a small pass waits for at most one slice of each of the others, however large those are. A slice is one
    visit to the compute thread: steps and samples have their turn in between. Nobody waits for company.

    Everything here happens on the event loop, the work on the compute thread.
    """

    def __init__(self, executors: Executors) -> None:
        self._executors = executors
        self._queue: list[_Waiting] = []
        self._worker: asyncio.Task[None] | None = None

    async def run(
        self,
        session: Session,
        request: PassRequest | LossRequest,
        *,
        group: Hashable | None = None,
        ensure_wanted: Callable[[], None] = lambda: None,
    ) -> PassResult:
        """Compute one pass. Whoever stops waiting takes it out of the queue before its next slice.

        Args:
            group: who may share a slice with it: those with the same. ``None`` is nobody.
            ensure_wanted: called before each of its slices; what it raises ends the pass.

        Raises:
            InvalidRequestError: as ``Session.start``, ``Pass.advance`` and ``Pass.result``.
        """
        outcome: asyncio.Future[PassResult] = asyncio.get_running_loop().create_future()
        waiting = _Waiting(session, request, group, ensure_wanted, outcome)
        self._queue.append(waiting)
        if self._worker is None:
            self._worker = asyncio.create_task(self._work(), name="passes")
        try:
            return await outcome
        finally:
            del waiting, outcome  # an error would lead to this frame, and from here back to itself

    async def close(self) -> None:
        """Cancel whoever waits; return when the slice under way has ended."""
        self._cancel_all()
        if self._worker is not None:
            await asyncio.wait({self._worker})

    async def _work(self) -> None:
        try:
            while company := self._next_company():
                self._settle(await self._executors.compute(_take_turn, company))
                company.clear()
                await asyncio.sleep(0)  # what the ended ones do next queues up before the next slice
        finally:  # also where the compute thread is gone: nobody waits for ever
            self._worker = None
            self._cancel_all()

    def _next_company(self) -> list[_Waiting]:
        """The head and those it may take along, after those that ended or left are gone."""
        self._queue = [w for w in self._queue if _is_wanted(w)]
        if not self._queue:
            return []
        head, *others = self._queue
        return [head, *(w for w in others if head.group is not None and w.group == head.group)]

    def _settle(self, turn: _Turn) -> None:
        stay = [w for w in self._queue if w not in turn.moved]
        self._queue = stay + [w for w in turn.moved if w in self._queue]
        for waiting, outcome in turn.ended:
            _end(waiting, outcome)
        turn.ended.clear()
        turn.moved.clear()

    def _cancel_all(self) -> None:
        for waiting in self._queue:
            waiting.outcome.cancel()
        self._queue.clear()


def _is_wanted(waiting: _Waiting) -> bool:
    if not waiting.outcome.done():
        try:
            waiting.ensure_wanted()
        except Exception as e:  # noqa: BLE001 - handed to the one who waits
            _end(waiting, e)
    return not waiting.outcome.done()


def _end(waiting: _Waiting, outcome: PassResult | Exception) -> None:
    if waiting.outcome.done():  # cancelled during the slice
        return
    if isinstance(outcome, Exception):
        # Its frames lead back to it, and would keep the batch until a garbage collection. Their lines stay readable.
        traceback.clear_frames(outcome.__traceback__)
        waiting.outcome.set_exception(outcome)
    else:
        waiting.outcome.set_result(outcome)


def _take_turn(company: Sequence[_Waiting]) -> _Turn:
    """On the compute thread: start those who are new, then one slice of the first, with the others.

    Whatever fails ends the one pass it belongs to.
    """
    turn = _Turn()
    for waiting in company:
        if waiting.work is None:
            try:
                waiting.work = waiting.session.start(waiting.request)
            except Exception as e:  # noqa: BLE001 - handed to the one who waits
                turn.ended.append((waiting, e))
    running = [(w, w.work) for w in company if w.work is not None]
    ready = [(w, work) for w, work in running if not work.finished]
    if ready:
        (head, work), *others = ready
        try:
            moved = {id(m) for m in work.advance([o for _, o in others])}
        except Exception as e:  # noqa: BLE001 - handed to the one who waits
            turn.ended.append((head, e))
            running.remove((head, work))
        else:
            turn.moved = [head, *(w for w, o in others if id(o) in moved)]
    for waiting, work in running:
        if work.finished:
            try:
                turn.ended.append((waiting, work.result()))
            except Exception as e:  # noqa: BLE001 - handed to the one who waits
                turn.ended.append((waiting, e))
    return turn

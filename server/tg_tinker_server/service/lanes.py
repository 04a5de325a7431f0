"""One ordered lane per training run: operations execute in sequence order, each at most once."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from tg_tinker.errors import (
    FutureCancelledError,
    InvalidRequestError,
    RateLimitedError,
    ServerError,
    TGTinkerError,
)

PENDING, RUNNING, COMPLETED, FAILED, CANCELLED = "pending", "running", "completed", "failed", "cancelled"
MAX_SKIPPED = 2**20
MAX_WAITING_BYTES = 256 * 2**20  # of requests in one lane
NEVER_CAME = "never_came"  # the name of an operation that stands for a request that did not arrive in time
NEAR = "contiguous"  # what a position far beyond the queue is not
ENDED = (COMPLETED, FAILED, CANCELLED)


@dataclass(eq=False)
class Operation:
    """One submitted call: where it stands, and what came of it.

    Attributes:
        digest: keyed MAC of the request; a retry must carry the same.
        work: what to do when its turn comes; takes the operation, returns the result.
        effect: whether it may change weights, so that a restart must execute it again.
        actor: id of the key that submitted it.
        committed: past the point where cancelling could still leave no effect.
    """

    run_id: str
    seq: int
    name: str
    digest: bytes
    work: Callable[[Operation], Awaitable[Any]] | None = None
    request_bytes: int = 0
    effect: bool = True
    actor: str = ""
    status: str = PENDING
    result: Any = None
    error: TGTinkerError | None = None
    cancel_requested: bool = False
    committed: bool = False
    stored: bool = False
    started_ns: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def future_id(self) -> str:
        """Derived, never stored: the position is the identity."""
        return future_id(self.run_id, self.seq)

    def finish(self, status: str, result: Any = None, error: TGTinkerError | None = None) -> None:
        """End the operation and wake everyone who waits for it."""
        if error is not None:  # kept with the results; the frames behind it would keep the batch
            error.__traceback__ = error.__cause__ = error.__context__ = None
        self.status, self.result, self.error = status, result, error
        self.work = None  # lets go of the batch
        self.ended.set()

    def ensure_wanted(self) -> None:
        """Raise FutureCancelledError if a cancellation came; leave no effect then."""
        if self.cancel_requested:
            raise FutureCancelledError(f"operation {self.future_id} was cancelled", future_id=self.future_id)

    def commit(self) -> None:
        """From here on the operation has an effect. Called on the event loop, so it cannot race with cancel.

        Raises:
            FutureCancelledError: a cancellation came first; leave no effect.
        """
        self.ensure_wanted()
        self.committed = True

    def elapsed_ms(self) -> float:
        """Milliseconds since its work began."""
        return (time.perf_counter_ns() - self.started_ns) / 1e6


def future_id(run_id: str, seq: int) -> str:
    """The public name of an operation."""
    return f"{run_id}.{seq}"


def parse_future_id(text: str) -> tuple[str, int] | None:
    """The position behind a future id, or ``None`` if it is not one."""
    run_id, dot, seq = text.rpartition(".")
    return (run_id, int(seq)) if dot and seq.isascii() and seq.isdigit() and len(seq) < 20 else None


class Lane:
    """The queue of one run. Everything here happens on the event loop; work is awaited, never run inline.

    Sequence numbers are contiguous. An early one waits for the gap before it to fill; one that was seen is
    answered with the operation it made. ``expected`` is the next number to execute.

    Attributes:
        patience_s: how long later operations wait for a number that does not arrive; then it is given up, and a
            failed operation stands in its place. ``None``: for ever.
        on_given_up: is told of each number that was given up, before the next operation executes.
    """

    def __init__(
        self,
        run_id: str,
        *,
        expected: int,
        max_queue: int,
        kept: int,
        on_crash: Callable[[Operation, Exception], TGTinkerError],
    ) -> None:
        self.run_id = run_id
        self.expected = expected
        self._max_queue = max_queue
        self._kept = kept
        self._on_crash = on_crash
        self._operations: dict[int, Operation] = {}
        self._finished_elsewhere: set[int] = set()
        self._arrived = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._current: asyncio.Task[Any] | None = None
        self._running: Operation | None = None
        self._closed = False
        self._gap_since: tuple[int, float] | None = None
        self.patience_s: float | None = None
        self.on_given_up: Callable[[Operation], None] | None = None

    def get(self, seq: int) -> Operation | None:
        """The operation at this position, if this process knows it."""
        return self._operations.get(seq)

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        return all(o.status in ENDED for o in self._operations.values())

    @property
    def next_pending(self) -> Operation | None:
        """The first operation that waits; when it ends there is room for one more."""
        return min((o for o in self._operations.values() if o.status not in ENDED), key=lambda o: o.seq, default=None)

    @property
    def highest(self) -> int:
        """The last position anybody used."""
        return max([self.expected - 1, *self._operations, *self._finished_elsewhere])

    def submit(self, operation: Operation) -> Operation:
        """Queue an operation, or return the one that already stands at its position.

        Raises:
            InvalidRequestError: the position is taken by a different request.
            RateLimitedError: too many operations wait.
        """
        known = self._operations.get(operation.seq)
        if known is not None:
            if known.digest != operation.digest and known.name != NEVER_CAME:
                raise InvalidRequestError(
                    f"sequence number {operation.seq} of {self.run_id} was used by a different request; another "
                    "handle drives this run. Get a fresh one with service.get_training_client",
                    field="seq",
                    constraint="one request per sequence number",
                )
            return known
        if operation.seq < self.expected or operation.seq in self._finished_elsewhere:
            raise ServerError(
                f"the result of operation {operation.future_id} is no longer kept and it is not run again",
                details={"aborted": True},
            )
        if operation.seq > self.expected + 4 * self._max_queue + len(self._finished_elsewhere):
            raise InvalidRequestError(
                f"sequence number {operation.seq} is far beyond {self.expected}, the next one to run",
                field="seq",
                constraint=NEAR,
            )
        if operation.status == PENDING:
            if self._closed:
                raise InvalidRequestError(
                    f"training client {self.run_id} is unloaded; create or restore one",
                    field="training_client_id",
                    constraint="active",
                )
            pending = [o.request_bytes for o in self._operations.values() if o.status == PENDING]
            waiting = len(pending)
            if waiting >= self._max_queue or (pending and sum(pending) + operation.request_bytes > MAX_WAITING_BYTES):
                raise RateLimitedError(
                    f"{waiting} operations of {self.run_id} are waiting; wait for some results first",
                    retry_after=1.0,
                )
        self._operations[operation.seq] = operation
        self._arrived.set()
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work(), name=f"lane-{self.run_id}")
        return operation

    def skip(self, seqs: Iterable[int]) -> None:
        """Positions that ended before a restart and need not be executed again."""
        limit = self.expected + MAX_SKIPPED
        found = {s for s in seqs if self.expected <= s < limit and s not in self._operations}
        if len(found) + len(self._finished_elsewhere) > MAX_SKIPPED:
            raise InvalidRequestError(
                f"more than {MAX_SKIPPED} finished operations; make a new training client",
                field="finished_seqs",
                constraint=f"at most {MAX_SKIPPED}",
            )
        self._finished_elsewhere |= found
        self._advance()
        self._arrived.set()

    def cancel(self, seq: int) -> bool:
        """Cancel if that leaves no effect; says whether it did."""
        operation = self._operations.get(seq)
        if operation is None or operation.status in ENDED or operation.committed:
            return operation is not None and operation.status == CANCELLED
        operation.cancel_requested = True
        if operation.status == PENDING:
            self._end_cancelled(operation)
            self._arrived.set()
        elif operation is self._running and not operation.effect and self._current is not None:  # e.g. a sample
            self._current.cancel()
        return True

    def unstored(self, upto: int) -> list[Operation]:
        """Ended operations up to a position whose results are not in the store yet."""
        ended = ((s, o) for s, o in sorted(self._operations.items()) if o.status in ENDED and not o.stored)
        return [o for s, o in ended if s <= upto]

    def forget(self, upto: int) -> None:
        """Drop stored results that are older than the last ones kept."""
        for seq in [s for s, o in self._operations.items() if s <= upto - self._kept and o.stored]:
            del self._operations[seq]

    async def close(self, error: TGTinkerError | None, *, grace_s: float = 0.0) -> None:
        """Take no more work; let the running operation end; fail those that wait.

        Without an error those that wait stay unanswered: their client sends them again to the next server.
        """
        self._closed = True
        for operation in self._operations.values():
            if operation.status == PENDING and error is not None:
                operation.finish(FAILED, error=error)
        self._arrived.set()
        if self._worker is not None and self._worker is not asyncio.current_task():
            done, _ = await asyncio.wait({self._worker}, timeout=grace_s)
            if not done:
                self._worker.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await self._worker

    def _advance(self) -> None:
        while True:
            operation = self._operations.get(self.expected)
            if self.expected in self._finished_elsewhere:
                self._finished_elsewhere.discard(self.expected)
            elif operation is None or operation.status not in ENDED:
                return
            self.expected += 1

    def _end_cancelled(self, operation: Operation) -> None:
        text = f"operation {operation.future_id} was cancelled"
        operation.finish(CANCELLED, error=FutureCancelledError(text, future_id=operation.future_id))

    async def _work(self) -> None:
        while not self._closed:
            self._advance()
            operation = self._operations.get(self.expected)
            if operation is not None:
                await self._execute(operation)
            elif not await self._next_arrival():
                self._give_up()

    async def _next_arrival(self) -> bool:
        """Wait for something to arrive. False: later operations have waited long enough for the gap before them."""
        self._arrived.clear()
        opened = self._gap_since
        if self.patience_s is None or not any(s > self.expected for s in self._operations):
            self._gap_since = None
            await self._arrived.wait()
            return True
        if opened is None or opened[0] != self.expected:
            opened = self._gap_since = (self.expected, time.monotonic())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._arrived.wait(), opened[1] + self.patience_s - time.monotonic())
            return True
        return False

    def _give_up(self) -> None:
        """Put failed operations into the gap. Late requests are answered with them; nothing runs out of order."""
        upto = min((s for s, o in self._operations.items() if s > self.expected), default=self.expected)
        upto = min([upto, *(s for s in self._finished_elsewhere if s > self.expected)])
        for seq in range(self.expected, upto):
            missing = Operation(self.run_id, seq, NEVER_CAME, b"")
            text = f"request {seq} of this model did not arrive within {self.patience_s:g} s and was given up"
            missing.finish(FAILED, error=InvalidRequestError(text, field="seq_id", constraint="contiguous"))
            self._operations[seq] = missing
            if self.on_given_up is not None:
                self.on_given_up(missing)

    async def _execute(self, operation: Operation) -> None:
        assert operation.work is not None
        operation.status, operation.started_ns = RUNNING, time.perf_counter_ns()
        self._running = operation
        self._current = asyncio.ensure_future(operation.work(operation))
        try:
            operation.finish(COMPLETED, result=await self._current)
        except FutureCancelledError as e:
            operation.finish(CANCELLED, error=e)
        except TGTinkerError as e:
            operation.finish(FAILED, error=e)
        except asyncio.CancelledError:
            if not operation.cancel_requested:
                operation.finish(FAILED, error=ServerError("the server is shutting down; the call can be repeated"))
                raise
            self._end_cancelled(operation)
        except Exception as e:  # noqa: BLE001 - a defect of one operation must not stop the lane; the hook logs it
            operation.finish(FAILED, error=self._on_crash(operation, e))
        finally:
            self._running = self._current = None

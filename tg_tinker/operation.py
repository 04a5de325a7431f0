"""One submitted call as this process knows it: where it stands, what came of it, the long poll that asks."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, Protocol

from tg_tinker._transport import RetryPolicy, Transport
from tg_tinker.errors import FutureCancelledError, ServerError, TGTinkerError
from tg_tinker.wire.calls import Position
from tg_tinker.wire.operations import (
    CANCELLED,
    COMPLETED,
    ENDED,
    FAILED,
    PENDING,
    UNKNOWN,
    FutureState,
    future_from_proto,
    get_future_request,
)

POLL_S = 30.0  # the server answers the moment the operation ends; this bounds silence on the connection
_PROBE_S = 2.0
_PAUSE_S = 0.5


class Owner(Protocol):
    """Who an operation reports to."""

    def saw(self, operation: Operation, state: FutureState) -> None:
        """Take note of a reply, before the operation acts on it."""
        ...

    def lost(self, operation: Operation, state: FutureState) -> None:
        """The server process does not know the operation: send it again, or end it."""
        ...

    def verify(self, operation: Operation, result: Any) -> None:
        """Hold the server to what it must prove of a result.

        Raises:
            TGTinkerError: it cannot.
        """
        ...

    def ending(self, operation: Operation, outcome: Any) -> None:
        """The operation is about to end with a result or an error."""
        ...

    def cancel(self, operation: Operation) -> bool:
        """Cancel it if that leaves no effect; says whether it did."""
        ...


class Operation:
    """A call with an outcome that will come.

    At most one long poll is under way, and only while somebody waits. The outcome is set once and never
    changes, whatever happens to the server afterwards.

    Attributes:
        outcome: the result, or the error, as a future; waiting on it alone asks nobody, see :meth:`watch`.
        status: as last heard: pending, running, completed, failed or cancelled.
    """

    def __init__(self, transport: Transport, owner: Owner, position: Position, name: str, *, known: bool) -> None:
        self.position = position
        self.name = name
        self.status = PENDING
        self.outcome: Future[Any] = Future()
        self.outcome.set_running_or_notify_cancel()  # cancelling an await must not cancel the operation
        self._transport = transport
        self._owner = owner
        self._lock = threading.Lock()
        self._known = known
        self._acceptances = 0
        self._watchers = 0
        self._polling = False

    @property
    def future_id(self) -> str:
        """The public name of the operation."""
        return self.position.future_id

    @property
    def ended(self) -> bool:
        """Whether the outcome is here."""
        return self.status in ENDED

    def watch(self) -> None:
        """Begin to wait: keep a long poll under way until the end, or until :meth:`unwatch`."""
        with self._lock:
            self._watchers += 1
        self._poll()

    def unwatch(self) -> None:
        """One waits no more."""
        with self._lock:
            self._watchers -= 1

    def accepted(self) -> None:
        """The server process has the operation, so it can be asked for it."""
        with self._lock:
            self._known = True
            self._acceptances += 1
        self._poll()

    def forgotten(self) -> None:
        """The server process that had the operation is gone; ask nobody until it is accepted again."""
        with self._lock:
            self._known = False

    def refresh(self) -> None:
        """Ask once where the operation stands. A server that cannot be reached leaves what is known."""
        with self._lock:
            if self.ended or not self._known:
                return
            asked = self._acceptances
        policy = RetryPolicy(retry_count=0, attempt_s=_PROBE_S)
        call = self._transport.send(get_future_request(self.position, wait_s=0.0), policy=policy)
        try:
            state = future_from_proto(call.result(_PROBE_S))
        except (FutureTimeout, TGTinkerError):
            return  # the status is what was heard last; whoever waits for the result hears the error
        self._take(state, asked)

    def cancel(self) -> bool:
        """Cancel if that leaves no effect; says whether it did."""
        if self.ended:
            return self.status == CANCELLED
        return self._owner.cancel(self)

    def cancelled(self) -> None:
        """End as cancelled."""
        text = f"operation {self.future_id} was cancelled and left no effect"
        self.end(CANCELLED, FutureCancelledError(text, future_id=self.future_id))

    def end(self, status: str, outcome: Any) -> None:
        """Set the outcome, a result or a TGTinkerError; the first one stays."""
        with self._lock:
            if self.ended:
                return
            self.status = status
        self._owner.ending(self, outcome)
        if isinstance(outcome, BaseException):
            self.outcome.set_exception(outcome)
        else:
            self.outcome.set_result(outcome)

    def poll_later(self) -> None:
        """Ask again after a pause, if somebody still waits."""
        self._transport.alarm.after(_PAUSE_S, self._poll)

    def learn(self, state: FutureState) -> None:
        """Act on a reply that was asked for elsewhere."""
        self._take(state, self._acceptances)

    def _poll(self) -> None:
        with self._lock:
            if self._polling or self.ended or not self._known or self._watchers <= 0:
                return
            self._polling = True
            asked = self._acceptances
        policy = self._transport.policy.with_attempt(POLL_S + 15.0)
        call = self._transport.send(get_future_request(self.position, wait_s=POLL_S), policy=policy)
        call.add_done_callback(lambda done: self._polled(done, asked))

    def _polled(self, call: Future[Any], asked: int) -> None:
        with self._lock:
            self._polling = False
        try:
            state = future_from_proto(call.result())
        except TGTinkerError as e:
            self.end(FAILED, e)
            return
        if self._take(state, asked):
            self._poll()

    def _take(self, state: FutureState, asked: int) -> bool:
        """Act on a reply to a question asked after so many acceptances; says whether to ask again at once."""
        self._owner.saw(self, state)
        if state.status == UNKNOWN:
            if asked != self._acceptances:
                return True  # it was accepted since, so the answer is old
            self._owner.lost(self, state)
            return False
        if state.status not in ENDED:
            with self._lock:
                if not self.ended:
                    self.status = state.status
            return True
        if isinstance(state.error, ServerError) and state.error.details.get("retry") is True:
            self.poll_later()  # the server is going down with the operation undone
            return False
        if state.status == COMPLETED:
            if self.ended:
                return False
            try:
                self._owner.verify(self, state.result)
            except TGTinkerError as e:
                self.end(FAILED, e)
            else:
                self.end(COMPLETED, state.result)
        else:
            self.end(state.status, state.error or ServerError(f"{self.name} failed and the server did not say why"))
        return False

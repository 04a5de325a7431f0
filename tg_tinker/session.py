"""One handle on one run: numbers its calls, sends them in order, and again when the server was restarted.

When the server answers under a new epoch, it is a new process: the session tells it which calls ended for good,
learns where the run's last durable state stands, and sends the journal again from there, byte for byte.
Outcomes that were delivered never change.

One submission is under way at a time, so a call is never received before the one it follows. That costs a
round trip for each call, and none of it is waiting for execution.
"""

from __future__ import annotations

import atexit
import logging
import secrets
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from tg_tinker._refusals import cannot_go_on, closed, not_sent, overtaken, too_large, went_back
from tg_tinker._transport import MAX_MESSAGE_BYTES, Transport, encode
from tg_tinker.errors import InvalidRequestError, LogVerificationError, ServerError, TGTinkerError
from tg_tinker.journal import Entry, Journal
from tg_tinker.log_guard import LogGuard, RunTerms
from tg_tinker.operation import Operation
from tg_tinker.types import LoadStateResult, OptimStepOutput, OptimStepResult
from tg_tinker.types.run import RunInfo
from tg_tinker.wire import calls
from tg_tinker.wire.call_messages import call_to_proto
from tg_tinker.wire.calls import LossPass, Pass, Position, Step, Updates
from tg_tinker.wire.operations import (
    FAILED,
    FutureState,
    Submission,
    cancel_future_request,
    resume_request,
    submission_from_proto,
)

_EXIT_S = 10.0  # how long a process that ends may take to hand over its calls
_log = logging.getLogger("tg_tinker")
_open: weakref.WeakSet[Session] = weakref.WeakSet()


@atexit.register
def _hand_over() -> None:
    """A script may end without waiting for its last calls; the server still gets them."""
    deadline = time.monotonic() + _EXIT_S
    for session in list(_open):
        session.flush(wait_s=max(0.0, deadline - time.monotonic()))


class Session:
    """Threads may share it. Everything here returns at once, except ``cancel`` and ``close``.

    Attributes:
        run_id: the run.
        step: optimizer steps as of the last result seen.
    """

    def __init__(self, transport: Transport, guard: LogGuard, info: RunInfo, *, takeover: bool = False) -> None:
        """A handle on the run that the server just described.

        Args:
            takeover: others drove the run before, so numbers below ours may be missing for good. The first
                submission then begins with a resume that passes over them.
        """
        self.run_id = info.run_id
        self.step = info.step
        self._step_seq = 0
        self._transport = transport
        self._guard = guard
        self._terms = RunTerms.of(info)
        self._handle = secrets.token_hex(8)
        self._lock = threading.RLock()
        self._moved = threading.Condition(self._lock)
        self._journal = Journal(info.next_seq)
        self._first_seq = info.next_seq
        self._epoch = "" if takeover else info.server_epoch
        self._sending: Entry | None = None
        self._resume_wanted = False
        self._resuming = False
        self._broken: TGTinkerError | None = None
        self._incomplete = ""
        self._unheard: set[Entry] = set()  # may have changed the step
        _open.add(self)

    @property
    def usable(self) -> bool:
        """Whether calls are still taken."""
        return self._broken is None

    @property
    def next_seq(self) -> int:
        """The number the next call gets."""
        return self._journal.next_seq

    @property
    def step_is_current(self) -> bool:
        """Whether every call that may have changed ``step`` has been heard of."""
        return not self._unheard

    def submit(self, call: calls.Call) -> Entry:
        """Take a call: it gets the next number and is sent after those before it.

        Raises:
            InvalidRequestError: it cannot be sent (too large, not JSON), or the handle is closed.
            TGTinkerError: what broke this handle.
        """
        return self.submit_all([call])[0]

    def submit_all(self, given: Sequence[calls.Call]) -> list[Entry]:
        """Take several calls, none or all; nothing that another thread submits comes between them.

        Raises:
            InvalidRequestError: one cannot be sent, or the handle is closed.
            TGTinkerError: what broke this handle.
        """
        with self._lock:
            if self._broken is not None:
                raise self._broken
            entries = [self._entry(call, self.next_seq + i) for i, call in enumerate(given)]
            if any(isinstance(call, Step) for call in given):
                self._incomplete = ""
            for entry in entries:
                if entry.weights:
                    self._unheard.add(entry)
                self._journal.add(entry)
        self._pump()
        return entries

    def _entry(self, call: calls.Call, seq: int) -> Entry:
        known_size = 0
        if isinstance(call, Step):
            known_size = self._guard.known_size
            call = replace(call, incomplete=self._incomplete, known_log_size=known_size)
        position = Position(run_id=self.run_id, seq=seq, handle=self._handle)
        method, payload = encode(call_to_proto(call, position))
        if len(payload) > MAX_MESSAGE_BYTES:
            raise too_large(len(payload), MAX_MESSAGE_BYTES)
        entry = Entry(self._transport, self, position, calls.OPERATION[type(call)], known=False)
        entry.request = (method, payload)
        entry.known_size = known_size
        entry.effect = calls.has_effect(call)
        entry.train_pass = isinstance(call, Updates) or (isinstance(call, Pass | LossPass) and call.train)
        entry.weights = entry.effect and not isinstance(call, Pass | LossPass | Updates)
        return entry

    def saw_run(self, info: RunInfo) -> None:
        """Take note of the run as the server described it just now."""
        if self._epoch:
            self._note(info.server_epoch, 0)
            self._pump()

    def await_weights(self) -> None:
        """Wait until every call made so far that may change the weights has ended, well or not."""
        with self._lock:
            under_way = list(self._unheard)
        for entry in under_way:
            entry.watch()
            try:
                entry.outcome.exception()
            finally:
                entry.unwatch()

    def flush(self, *, wait_s: float) -> None:
        """Wait until the server has every call made so far, for up to ``wait_s`` seconds."""
        with self._lock:
            self._moved.wait_for(lambda: not self.usable or not self._journal.queue, timeout=wait_s)
            unsent = len(self._journal.queue)
        if unsent:
            _log.warning("%d calls of %s did not reach the server", unsent, self.run_id)

    def close(self, *, wait_s: float) -> None:
        """Take no more calls. Those taken are sent first, for up to ``wait_s`` seconds."""
        self.flush(wait_s=wait_s)
        self._break(closed(self.run_id))

    # What operations report.

    def saw(self, operation: Operation, state: FutureState) -> None:  # noqa: ARG002 - of the protocol
        """Every reply says which server process answered and what is durable."""
        self._note(state.server_epoch, state.durable_seq)
        self._pump()

    def lost(self, operation: Operation, state: FutureState) -> None:
        """A new server process does not have it: it is sent again. The same process dropped it: it is gone."""
        entry = _entry(operation)
        with self._lock:
            resending = self._resume_wanted or self._resuming or entry in self._journal.queue
            known = entry.epoch == state.server_epoch == self._epoch
            gone = not self.usable or entry.seq <= self._journal.durable_seq or (known and not resending)
            if not gone and resending:
                entry.forgotten()  # accepted() wakes it again
        if gone:
            text = f"the server no longer keeps the result of {entry.future_id}"
            entry.end(FAILED, self._broken or ServerError(text))
        elif not resending:
            entry.poll_later()

    def verify(self, operation: Operation, result: Any) -> None:
        """Hold a step to the receipt of its charge.

        Raises:
            LogVerificationError: it has none, or the server's log is not what it was.
            InvalidRequestError: what is remembered of the log is damaged.
        """
        entry = _entry(operation)
        if not isinstance(result, OptimStepOutput):
            return
        try:
            self._guard.accept(self._terms, entry.seq, entry.known_size, result)
        except TGTinkerError as e:
            self._break(e, everything=True)
            raise

    def ending(self, operation: Operation, outcome: Any) -> None:
        """Learn the step from results; let go of requests that need not be sent again."""
        entry = _entry(operation)
        with self._lock:
            self._unheard.discard(entry)
            if isinstance(outcome, OptimStepResult | LoadStateResult) and entry.seq > self._step_seq:
                self.step, self._step_seq = outcome.step, entry.seq
            if entry.finished and entry not in self._journal.queue:
                self._journal.finish(entry)

    def cancel(self, operation: Operation) -> bool:
        """Cancel a call: here if the server has nothing of it yet, there otherwise.

        Raises:
            TGTinkerError: the server could not be asked.
        """
        entry = _entry(operation)
        with self._lock:
            under_way, call = entry is self._sending, entry.call
            unsent = not under_way and not entry.epoch and entry in self._journal.queue
            entry.skip = entry.skip or unsent
        if unsent:
            entry.cancelled()
            self._pump()  # tells the server to pass over the number when its turn comes
            return True
        if call is not None:
            call.withdraw()
            error = call.exception()  # waits for the server's answer to what is under way
            if error is not None:
                if _withdrawn(error):
                    entry.cancelled()
                return _withdrawn(error)
        reply = self._transport.call(cancel_future_request(entry.position))
        if reply.cancelled:
            entry.cancelled()
        return bool(reply.cancelled)

    # Sending.

    def _pump(self) -> None:
        """Send the next call, or resume first if the server process changed."""
        with self._lock:
            if not self.usable or self._sending is not None or self._resuming:
                return
            head = self._journal.queue[0] if self._journal.queue else None
            if self._resume_wanted or (head is not None and head.finished):
                self._resume_wanted, self._resuming = False, True
            elif head is not None:
                self._sending = head
            else:
                return
            resuming = self._resuming
        if resuming or head is None:
            # A new process may have an older database: nothing is sent to it before it has shown its log.
            self._guard.check_later().add_done_callback(self._checked)
            return
        assert head.request is not None
        call = self._transport.send(head.request, back_pressure=True)
        with self._lock:
            if self._sending is head:
                head.call = call
        call.add_done_callback(lambda done: self._sent(head, done))

    def _checked(self, check: Future[None]) -> None:
        error = check.exception()
        if error is not None:
            with self._lock:
                self._resuming = False
            assert isinstance(error, TGTinkerError)
            self._break(
                error if isinstance(error, LogVerificationError) else cannot_go_on(self.run_id, error),
                everything=True,
            )
            return
        with self._lock:
            request = encode(resume_request(self.run_id, self._journal.finished_seqs()))
        self._transport.send(request, back_pressure=True).add_done_callback(self._resumed)

    def _sent(self, entry: Entry, call: Future[Any]) -> None:
        error = call.exception()
        with self._lock:
            self._sending = entry.call = None
            if error is None:
                answer = submission_from_proto(call.result())
                self._journal.accepted(entry, answer.server_epoch)
                if entry.finished:
                    self._journal.finish(entry)
            elif _withdrawn(error):
                entry.skip = True
            self._moved.notify_all()
        if entry.skip:
            entry.cancelled()
        elif error is None:
            entry.accepted()
            self._note(answer.server_epoch, answer.durable_seq)
        else:
            assert isinstance(error, TGTinkerError)
            self._refused(entry, error)
        self._pump()

    def _refused(self, entry: Entry, error: TGTinkerError) -> None:
        """The server would not take a call, or could not be reached."""
        later: list[Entry] = []
        collided = isinstance(error, InvalidRequestError) and error.field == "seq"
        with self._lock:
            if error.details.get("aborted") is True:  # its number is used up, its result is gone
                self._journal.accepted(entry, self._epoch)
                dead = False
            else:
                dead = self._journal.replaying() or collided or error.details.get("retry") is True
            if not dead and self.usable and error.details.get("aborted") is not True:
                later = self._journal.roll_back(entry)
                passes = [e.name for e in later if e.train_pass]
                if passes:
                    self._incomplete = f"{passes[0]} was refused: {error.message}"
            self._moved.notify_all()
        broken = cannot_go_on(self.run_id, error)
        entry.end(FAILED, broken if collided else error)
        _fail(later, not_sent(entry.name, error))
        if dead:
            self._break(broken)

    def _resumed(self, call: Future[Any]) -> None:
        error = call.exception()
        if error is None:
            error = self._restart(submission_from_proto(call.result()))
        with self._lock:
            self._resuming = False
        if isinstance(error, TGTinkerError):
            self._break(cannot_go_on(self.run_id, error), everything=True)
        self._pump()

    def _restart(self, answer: Submission) -> TGTinkerError | None:
        """Queue what the server process needs again; says why if it cannot be given."""
        with self._lock:
            expected, durable = answer.expected_seq, self._journal.durable_seq
            if expected <= durable:
                return went_back(expected, durable)
            if expected > self.next_seq:
                return overtaken(expected, self.next_seq)
            self._epoch = answer.server_epoch
            if self._journal.pass_over(range(expected, self._first_seq)):
                self._resume_wanted = True
            known = self._journal.forget(answer.durable_seq)
            known += self._journal.restart(answer.server_epoch, expected)
            self._moved.notify_all()
        for entry in known:
            entry.accepted()
        return None

    def _note(self, epoch: str, durable_seq: int) -> None:
        with self._lock:
            durable = self._journal.forget(durable_seq)
            if epoch and epoch != self._epoch and not self._resuming:
                self._resume_wanted = True
        for entry in durable:
            entry.accepted()  # a restarted server kept its result, so it need not wait to be sent again

    def _break(self, error: TGTinkerError, *, everything: bool = False) -> None:
        """Take no more calls; end those the server does not have, or whose fate cannot be known."""
        with self._lock:
            self._broken = self._broken or error
            _open.discard(self)
            kept = self._journal.clear()
            self._moved.notify_all()
        _fail((e for e in kept if everything or e.epoch != self._epoch), self._broken)


def _entry(operation: Operation) -> Entry:
    assert isinstance(operation, Entry)
    return operation


def _withdrawn(error: BaseException) -> bool:
    return isinstance(error, TGTinkerError) and error.details.get("withdrawn") is True


def _fail(entries: Iterable[Entry], error: TGTinkerError) -> None:
    for entry in entries:
        entry.end(FAILED, error)

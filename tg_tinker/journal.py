"""The calls of a run that a restarted server may need again. Pure bookkeeping: no locks, no network.

Sequence numbers are contiguous. Up to ``durable_seq`` effects survive a restart of the server, and nothing is
kept. Above it, each number is either finished (ended for good without an effect) or has its request here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from tg_tinker._transport import Call
from tg_tinker.operation import Operation
from tg_tinker.wire.methods import Method
from tg_tinker.wire.operations import CANCELLED


class Entry(Operation):
    """An operation with what is needed to send it again.

    Attributes:
        request: where and what to send; dropped once it cannot be needed again.
        effect: it may change weights or the pending gradient, so a restarted server must execute it again.
        train_pass: it adds to the logical batch.
        weights: it may change the run's step.
        epoch: the server process that accepted it, empty before any has.
        call: the submission under way or last made.
        known_size: of the log, as the request named it.
        skip: cancelled before it was sent; the server is told to pass over its number.
    """

    request: tuple[Method, bytes] | None = None
    effect = False
    train_pass = False
    weights = False
    epoch = ""
    call: Call | None = None
    known_size = 0
    skip = False

    @property
    def seq(self) -> int:
        """Its sequence number."""
        return self.position.seq

    @property
    def finished(self) -> bool:
        """It ended for good and left no effect: nobody need execute it again."""
        return self.skip or (self.ended and (not self.effect or self.status == CANCELLED))


class Journal:
    """Numbers calls and knows which are to be sent, which to be kept, and which are done with.

    Attributes:
        queue: entries to send, in order.
        next_seq: the number the next entry gets.
        durable_seq: effects up to here survive, as far as heard.
    """

    def __init__(self, next_seq: int) -> None:
        self.queue: deque[Entry] = deque()
        self.next_seq = next_seq
        self.durable_seq = 0
        self._kept: dict[int, Entry] = {}  # in order of their numbers
        self._finished: set[int] = set()

    def add(self, entry: Entry) -> None:
        """Take the entry that was given ``next_seq``."""
        self.next_seq = entry.seq + 1
        self._kept[entry.seq] = entry
        self.queue.append(entry)

    def accepted(self, entry: Entry, epoch: str) -> None:
        """A server process has it."""
        entry.epoch = epoch
        if self.queue and self.queue[0] is entry:
            self.queue.popleft()

    def finish(self, entry: Entry) -> None:
        """It ended without an effect: keep nothing of it but its number."""
        entry.request = None
        if self._kept.get(entry.seq) is entry:  # after a roll back another entry may have the number
            del self._kept[entry.seq]
            self._finished.add(entry.seq)

    def pass_over(self, seqs: Iterable[int]) -> bool:
        """Nobody can give these numbers any more: call them finished. Says whether that is new."""
        new = set(seqs) - self._finished
        self._finished |= new
        return bool(new)

    def finished_seqs(self) -> list[int]:
        """What a restarted server must not execute again, though it has not heard of it."""
        return sorted({*self._finished, *(e.seq for e in self._kept.values() if e.finished)})

    def forget(self, durable_seq: int) -> list[Entry]:
        """Effects up to here survive a restart. Returns the entries that are no longer kept."""
        gone = []
        self.durable_seq = max(self.durable_seq, durable_seq)
        while self._kept and (first := next(iter(self._kept))) <= self.durable_seq:
            entry = self._kept.pop(first)
            entry.request = None
            gone.append(entry)
        while self.queue and self.queue[0].seq <= self.durable_seq:
            self.queue.popleft()
        if self._finished and min(self._finished) <= self.durable_seq:
            self._finished = {s for s in self._finished if s > self.durable_seq}
        return gone

    def replaying(self) -> bool:
        """Whether something in the queue was sent before, to a server process that is gone."""
        return any(e.epoch or (e.ended and not e.finished) for e in self.queue)

    def roll_back(self, entry: Entry) -> list[Entry]:
        """The server has nothing from this entry on: free the numbers. Returns it and those after it."""
        dropped = [e for e in self.queue if e.seq >= entry.seq]
        for e in dropped:
            self.queue.remove(e)
            self._kept.pop(e.seq, None)
            self._finished.discard(e.seq)
        self.next_seq = entry.seq
        return dropped

    def restart(self, epoch: str, expected_seq: int) -> list[Entry]:
        """Queue what a server process needs again. Returns the entries it has already."""
        known = []
        self.queue.clear()
        for entry in list(self._kept.values()):
            if entry.finished:
                self.finish(entry)
            elif entry.seq < expected_seq or entry.epoch == epoch:
                entry.epoch = epoch
                known.append(entry)
            else:
                self.queue.append(entry)
        return known

    def clear(self) -> list[Entry]:
        """Forget everything. Returns the entries that were kept."""
        kept = list(self._kept.values())
        self._kept.clear()
        self.queue.clear()
        return kept

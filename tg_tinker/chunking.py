"""A call on many datums as several requests of one logical batch, and one handle on all of them."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from tg_tinker import metrics
from tg_tinker.operation import Operation
from tg_tinker.types import ForwardBackwardOutput
from tg_tinker.types.datum import Datum
from tg_tinker.wire.operations import CANCELLED, COMPLETED, FAILED, PENDING, RUNNING

MOST_DATUMS = 1024
MOST_BYTES = 5_000_000
_DOMAIN = b"tg-tinker/chunks/v1\x00"
_log = logging.getLogger("tg_tinker")


def estimated_bytes(datum: Datum) -> int:
    """About what a datum takes on the wire."""
    tensors = datum.loss_fn_inputs.values()
    stored = sum(len(t.data) * (8 if t.dtype == "int64" else 4) for t in tensors)
    return 8 * datum.model_input.length + stored + sum(16 * len(t.data) for t in tensors if t.is_sparse)


def chunks(data: Sequence[Datum], *, most_datums: int = MOST_DATUMS, most_bytes: int = MOST_BYTES) -> list[slice]:
    """Consecutive parts of at most so many datums and estimated bytes; a datum that is larger stands alone.

    No datum makes one empty part: the server knows whether an empty batch is one.
    """
    parts, start, size = [], 0, 0
    for i, datum in enumerate(data):
        more = estimated_bytes(datum)
        if i > start and (size + more > most_bytes or i - start >= most_datums):
            parts.append(slice(start, i))
            start, size = i, 0
        size += more
    return [*parts, slice(start, len(data))]


def combined(outputs: Sequence[ForwardBackwardOutput]) -> ForwardBackwardOutput:
    """The outputs of all parts in order, as one; metrics are reduced as their names say.

    The hashes are of the hashes of the parts.
    """
    if len(outputs) == 1:
        return outputs[0]
    kinds = {o.loss_fn_output_type for o in outputs}
    if len(kinds) > 1:
        _log.warning("the parts of a batch have outputs of different types: %s", ", ".join(sorted(kinds)))
    weights = [len(o.loss_fn_outputs) for o in outputs]
    return ForwardBackwardOutput(
        loss=sum(o.loss for o in outputs),
        batch_hash=_joined([o.batch_hash for o in outputs]),
        gradient_hash=_joined([o.gradient_hash for o in outputs]),
        num_tokens=sum(o.num_tokens for o in outputs),
        latency_ms=sum(o.latency_ms for o in outputs),
        metrics=metrics.reduce([o.metrics for o in outputs], weights),
        loss_fn_output_type=outputs[0].loss_fn_output_type,
        loss_fn_outputs=[one for o in outputs for one in o.loss_fn_outputs],
    )


def _joined(hashes: Sequence[str]) -> str:
    scheme = hashes[0].partition(":")[0]
    return f"{scheme}:{hashlib.sha256(_DOMAIN + chr(10).join(hashes).encode()).hexdigest()}" if all(hashes) else ""


class Joined:
    """Several operations as one: it has the outcome that ``finish`` makes of theirs, or the first failure.

    Of none it is what ``finish`` makes of nothing, at once.

    Attributes:
        outcome: as of an Operation.
    """

    def __init__(self, parts: Sequence[Operation], finish: Callable[[list[Any]], Any]) -> None:
        self._parts, self._finish = list(parts), finish
        self._lock = threading.Lock()
        self._waiting = len(self._parts)
        self.name = self._parts[-1].name if self._parts else ""
        self.outcome: Future[Any] = Future()
        self.outcome.set_running_or_notify_cancel()
        for part in self._parts:
            part.outcome.add_done_callback(self._ended)
        if not self._parts:
            self.outcome.set_result(finish([]))

    @property
    def future_id(self) -> str:
        """That of the last part."""
        return self._parts[-1].future_id if self._parts else ""

    @property
    def status(self) -> str:
        """completed once all parts are; failed or cancelled as soon as one is; running once one has begun."""
        known = [part.status for part in self._parts]
        for ended in (FAILED, CANCELLED):
            if ended in known:
                return ended
        if all(status == COMPLETED for status in known):
            failed = self.outcome.done() and self.outcome.exception() is not None
            return FAILED if failed else COMPLETED
        return PENDING if all(status == PENDING for status in known) else RUNNING

    def watch(self) -> None:
        """Begin to wait for every part."""
        for part in self._parts:
            part.watch()

    def unwatch(self) -> None:
        """One waits no more."""
        for part in self._parts:
            part.unwatch()

    def refresh(self) -> None:
        """Ask once where each part stands."""
        for part in self._parts:
            part.refresh()

    def cancel(self) -> bool:
        """Only one part can be cancelled without an effect: of several, some may have run already."""
        return len(self._parts) == 1 and self._parts[0].cancel()

    def _ended(self, part: Future[Any]) -> None:
        with self._lock:
            self._waiting -= 1
            over = self.outcome.done()
            error = part.exception()
            last = self._waiting == 0 and not over
            if error is not None and not over:
                self.outcome.set_exception(error)
                return
        if last:
            try:
                self.outcome.set_result(self._finish([p.outcome.result() for p in self._parts]))
            except Exception as e:  # noqa: BLE001 - whoever waits must learn of it
                self.outcome.set_exception(e)

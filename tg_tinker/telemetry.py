"""Hooks: what happens while custom losses and regularizers are computed, for those who asked to be told.

    custom_loss.start | .stop | .exception             duration_s, value, datums, regularizers, grad_norms
    regularizer.compute.start | .stop | .exception     name, weight, duration_s, value, contribution
    queue.state                                        reason, retry_after; at most once a minute for a connection

Events carry names, figures and durations, never tokens or log-probabilities. Nothing leaves the process.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tg_tinker.errors import InvalidRequestError

Handler = Callable[[str, Mapping[str, Any]], None]
_log = logging.getLogger("tg_tinker")
_lock = threading.Lock()
_handlers: dict[str, tuple[tuple[str, ...], Handler]] = {}


def attach(handler_id: str, handler: Handler, events: str | Sequence[str] = "") -> None:
    """Have ``handler(event, values)`` called for every event that begins with one of ``events``.

    It is called on the thread where the event happens. One that raises is logged and detached: an observer must not
    stop training.

    Args:
        handler_id: to detach it by.
        events: beginnings of names, as ``"regularizer.compute"``; empty: all.

    Raises:
        InvalidRequestError: the id is taken.
    """
    with _lock:
        if handler_id in _handlers:
            raise InvalidRequestError(
                f"a handler {handler_id!r} is attached already; detach it first",
                field="handler_id",
                constraint="not attached",
            )
        _handlers[handler_id] = ((events,) if isinstance(events, str) else tuple(events), handler)


def detach(handler_id: str) -> bool:
    """Call it no more; says whether it was attached."""
    with _lock:
        return _handlers.pop(handler_id, None) is not None


def attach_logger(handler_id: str = "logger", *, level: int = logging.INFO) -> None:
    """Write every event to the logger ``tg_tinker``."""
    attach(handler_id, lambda event, values: _log.log(level, "%s %s", event, dict(values)))


def emit(event: str, /, **values: Any) -> None:
    """Tell those who asked."""
    with _lock:
        wanted = [(i, h) for i, (events, h) in _handlers.items() if event.startswith(events)]
    for handler_id, handler in wanted:
        try:
            handler(event, values)
        except Exception:  # noqa: BLE001 - an observer must not stop training; logged
            _log.exception("the telemetry handler %s failed and is detached", handler_id)
            detach(handler_id)


@contextmanager
def span(event: str, /, **values: Any) -> Iterator[dict[str, Any]]:
    """Emit ``event.start``, then ``event.stop`` or ``event.exception``; the dict goes with the end."""
    emit(f"{event}.start", **values)
    found: dict[str, Any] = {}
    started = time.monotonic()
    try:
        yield found
    except BaseException as e:
        emit(f"{event}.exception", **values, error=type(e).__name__, duration_s=time.monotonic() - started)
        raise
    emit(f"{event}.stop", **values, **found, duration_s=time.monotonic() - started)

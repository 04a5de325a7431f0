"""Runs functions later, all on one thread: the pauses between retries cost no thread each."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable

_log = logging.getLogger("tg_tinker")


class Alarm:
    """Runs functions later, all of them on one thread that starts when first needed."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def after(self, delay_s: float, function: Callable[[], None]) -> None:
        """Run ``function`` in ``delay_s`` seconds, or at once when the alarm is closed before."""
        with self._changed:
            closed = self._closed
            if not closed:
                heapq.heappush(self._due, (time.monotonic() + delay_s, next(self._order), function))
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="tg-tinker-alarm", daemon=True)
                    self._thread.start()
                self._changed.notify()
        if closed:
            function()

    def close(self) -> None:
        """Run everything that waits now and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            idle = self._thread is None
        if idle:
            self._run()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (not self._due or self._due[0][0] > time.monotonic()):
                    self._changed.wait(self._due[0][0] - time.monotonic() if self._due else None)
                if not self._due:
                    return
                function = heapq.heappop(self._due)[2]
            try:
                function()
            except Exception:  # noqa: BLE001 - one failing function must not stop the others; logged
                _log.exception("a delayed call of tg_tinker failed")

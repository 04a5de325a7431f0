"""What the server says of its queues: kept, told to observers, and logged at most once a minute."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

from tg_tinker import telemetry
from tg_tinker.errors import RateLimitedError

EVERY_S = 60.0
_log = logging.getLogger("tg_tinker")


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueState:
    """Whether the server takes work.

    Attributes:
        waiting: it said that a queue or quota is full, and the time after which to ask again has not come.
        reason: in its words; empty unless waiting.
        retry_after_s: until then.
    """

    waiting: bool = False
    reason: str = ""
    retry_after_s: float = 0.0


class Pressure:
    """Of one connection; threads share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._until = self._logged = float("-inf")
        self._reason = ""

    @property
    def state(self) -> QueueState:
        """As the server said last."""
        with self._lock:
            left = self._until - time.monotonic()
            return QueueState(waiting=True, reason=self._reason, retry_after_s=left) if left > 0 else QueueState()

    def heard(self, error: RateLimitedError) -> None:
        """The server refused work for want of room."""
        now = time.monotonic()
        with self._lock:
            self._until, self._reason = now + error.retry_after, error.message
            due = now - self._logged >= EVERY_S
            self._logged = now if due else self._logged
        if due:
            _log.warning("waiting for the server: %s", error.message)
            telemetry.emit("queue.state", reason=error.message, retry_after=error.retry_after)

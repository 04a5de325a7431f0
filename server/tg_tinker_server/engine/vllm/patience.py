"""How long a worker may say nothing, and how often it may end before it is left alone for a while."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

MOST_ENDS = 3
"""So often a worker may end by itself within ``ENDS_WITHIN_S`` before no other is started."""
ENDS_WITHIN_S = 600.0
SILENT_S = 600.0
"""A worker that owes an answer and says nothing for so long is ended."""
SILENT_ON_CPU_S = 3600.0
"""It speaks after a run through the model, and there a long one takes minutes."""
STARTING_S = 3600.0
"""The same while it starts: large models are loaded and compiled."""


class Patience:
    """Patience with the workers of one model.

    Args:
        silent_s: see ``SILENT_S``.
        clock: seconds.
    """

    def __init__(self, *, silent_s: float = SILENT_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._silent_s, self.clock = silent_s, clock
        self._silent_since: float | None = None
        self._lost_s = 0.0  # to silence: three workers that hang have ended one after the other, whatever it took
        self._ends: deque[float] = deque(maxlen=MOST_ENDS)

    def heard(self) -> None:
        """The worker said something, or owes nothing."""
        self._silent_since = None

    def is_over(self, *, ready: bool) -> bool:
        """Whether a worker that owes an answer, and again said nothing, has been silent for too long."""
        now = self.clock()
        if self._silent_since is None:
            self._silent_since = now
        silent_s = now - self._silent_since
        if silent_s <= (self._silent_s if ready else STARTING_S):
            return False
        self._lost_s += silent_s
        return True

    def ended(self) -> None:
        """A worker has ended by itself, or for its silence."""
        self._silent_since = None
        self._ends.append(self.clock() - self._lost_s)

    @property
    def ends_too_often(self) -> bool:
        """Whether no other should be started now."""
        now = self.clock() - self._lost_s
        return len(self._ends) == MOST_ENDS and now - self._ends[0] < ENDS_WITHIN_S

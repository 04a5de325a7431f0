"""How much work a call is, counted in ways that a busy machine and other threads do not change."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from typing import Any


def calls_of(fn: Callable[[], object]) -> int:
    """Calls of Python and of C functions that this thread makes in ``fn``."""
    count = 0

    def profile(_frame: Any, event: str, _arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        fn()
    finally:
        sys.setprofile(before)
    return count


def peak_bytes(fn: Callable[[], object], tries: int = 1) -> int:
    """Most memory that ``fn`` held at a time, of what Python allocates.

    Other threads of the process only ever add to it. Where what is looked for is not much larger than what they might
    allocate meanwhile, the least of several tries is taken.
    """
    return min(_peak(fn) for _ in range(tries))


def _peak(fn: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        result = fn()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        del result

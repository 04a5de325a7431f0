"""Where work runs: one compute thread for the model, some threads for disk; never the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

UPLOAD_THREADS = 32  # most of them wait for their callers
IO_THREADS = 16  # most of them wait for the disk on behalf of steps; the rest answer who only reads
P = ParamSpec("P")
T = TypeVar("T")


class Executors:
    """The threads of a server.

    Models share weights in memory, so all of them are driven from one thread. Lanes hand it one piece of work
    at a time, first come first served: with many runs active each gets its turn.
    """

    def __init__(self) -> None:
        self._compute = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._io = ThreadPoolExecutor(IO_THREADS, thread_name_prefix="io")
        self._uploads = ThreadPoolExecutor(UPLOAD_THREADS, thread_name_prefix="upload")
        self._accounting = ThreadPoolExecutor(1, thread_name_prefix="accounting")

    async def compute(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run on the compute thread."""
        return await asyncio.get_running_loop().run_in_executor(self._compute, lambda: fn(*args, **kwargs))

    async def io(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run on a disk thread: database, artifacts, keys."""
        return await asyncio.get_running_loop().run_in_executor(self._io, lambda: fn(*args, **kwargs))

    def io_later(self, fn: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Run on a disk thread when one is free. Nobody waits for it, hears its errors, or misses it after a stop."""
        with contextlib.suppress(RuntimeError):  # closed already
            self._io.submit(fn, *args, **kwargs)

    def upload(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Run where waiting for a slow caller keeps nobody else waiting. It runs to its end, awaited or not."""
        return asyncio.get_running_loop().run_in_executor(self._uploads, lambda: fn(*args, **kwargs))

    async def accounting(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run long arithmetic (plans, forecasts, reports) where it keeps neither keys nor steps waiting."""
        return await asyncio.get_running_loop().run_in_executor(self._accounting, lambda: fn(*args, **kwargs))

    def close(self) -> None:
        """Let running work end, drop what waits."""
        self._uploads.shutdown(wait=True, cancel_futures=True)
        self._compute.shutdown(wait=True, cancel_futures=True)
        self._accounting.shutdown(wait=True, cancel_futures=True)
        self._io.shutdown(wait=True, cancel_futures=True)

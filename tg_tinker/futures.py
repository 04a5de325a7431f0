"""FutureHandle: the result of a call that was submitted, to wait for with ``result()`` or ``await``."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

from tg_tinker.chunking import Joined
from tg_tinker.errors import FutureTimeoutError, TGTinkerError
from tg_tinker.operation import Operation
from tg_tinker.wire.operations import CANCELLED, COMPLETED, FAILED


class Status(str):
    """A status that may also be called: ``future.status`` and ``future.status()`` are the same text."""

    __slots__ = ()

    def __call__(self) -> str:
        """The status as plain text."""
        return str(self)


class FutureHandle:
    """A call on its way through the run's queue.

    Nothing runs in the background for a handle nobody asks. The outcome is fixed once it is here: asking again
    returns the same object, and a restart of the server does not change it.
    """

    def __init__(self, operation: Operation | Joined) -> None:
        self._operation = operation

    @property
    def id(self) -> str:
        """The operation's id; ``service.get_future(id)`` finds it again, from any process."""
        return self._operation.future_id

    future_id = id

    @property
    def operation(self) -> str:
        """forward_backward, optim_step, sample, save_state or load_state."""
        return self._operation.name

    @property
    def status(self) -> Status:
        """pending, running, completed, failed or cancelled, as the server says now."""
        self._operation.refresh()
        return Status(self._operation.status)

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the result.

        Args:
            timeout: seconds; ``None`` waits for as long as it takes.

        Raises:
            FutureTimeoutError: it has not come yet. The operation goes on; ask again.
            FutureCancelledError: it was cancelled.
            TGTinkerError: what the operation failed with.
        """
        operation = self._operation
        operation.watch()
        try:
            return operation.outcome.result(timeout)
        except FutureTimeout as e:
            if operation.outcome.done():
                return operation.outcome.result()  # it came just now, or its error is a timeout itself
            raise self._timed_out(timeout) from e
        finally:
            operation.unwatch()

    async def result_async(self, timeout: float | None = None) -> Any:
        """The same for a coroutine; cancelling the wait does not cancel the operation."""
        operation = self._operation
        operation.watch()
        try:
            return await asyncio.wait_for(asyncio.wrap_future(operation.outcome), timeout)
        except TimeoutError as e:
            if operation.outcome.done():
                return operation.outcome.result()
            raise self._timed_out(timeout) from e
        finally:
            operation.unwatch()

    def __await__(self) -> Generator[Any, None, Any]:
        return self.result_async().__await__()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end, however it ends; says whether it came within ``timeout`` seconds."""
        try:
            self.result(timeout)
        except TGTinkerError:
            return self._operation.outcome.done()
        return True

    def is_done(self) -> bool:
        """Whether it has ended, in any way. Asks the server, does not wait."""
        return self.status in (COMPLETED, FAILED, CANCELLED)

    def is_success(self) -> bool:
        """Whether it has ended with a result."""
        return self.status == COMPLETED

    def is_failed(self) -> bool:
        """Whether it has ended with an error; a cancelled one has not failed."""
        return self.status == FAILED

    def get_error(self) -> TGTinkerError | None:
        """The error it ended with, ``None`` while it has not ended or when it succeeded. Does not wait."""
        if not self.is_done():
            return None
        error = self._operation.outcome.exception()
        assert error is None or isinstance(error, TGTinkerError)
        return error

    done = is_done
    exception = get_error

    def cancel(self) -> bool:
        """Cancel if that leaves no effect: True then, and the result is a FutureCancelledError; else False."""
        return self._operation.cancel()

    def __repr__(self) -> str:
        return f"<FutureHandle {self.id} {self.operation} {self._operation.status}>"

    def _timed_out(self, timeout: float | None) -> FutureTimeoutError:
        return FutureTimeoutError(
            f"{self.operation} {self.id} has not ended within {timeout} s; it goes on, ask again",
            future_id=self.id,
            timeout=timeout,
        )

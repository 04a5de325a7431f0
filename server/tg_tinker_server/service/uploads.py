"""What callers stream to the server: places for each tenant, a least pace, and an end when the caller gives up."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tg_tinker.errors import FutureCancelledError, InvalidRequestError
from tg_tinker_server.service.executors import Executors

T = TypeVar("T")
PATIENCE_S = 60.0
SLOWEST_BYTES_PER_S = 128 * 1024
MOST_PER_TENANT = 2


class Places:
    """How many of a kind each tenant may have under way; nobody waits for another tenant's."""

    def __init__(self, most: int = MOST_PER_TENANT) -> None:
        self._most = most
        self._places: dict[str, asyncio.Semaphore] = {}

    def of(self, tenant: str) -> asyncio.Semaphore:
        """The places of one tenant."""
        return self._places.setdefault(tenant, asyncio.Semaphore(self._most))


@dataclass(frozen=True, slots=True)
class Uploads:
    """Uploads under way, each read by a thread of its own."""

    executors: Executors
    places: Places = field(default_factory=Places)

    async def take(
        self,
        tenant: str,
        data: AsyncIterator[bytes],
        work: Callable[[Iterator[bytes], threading.Event], T],
        *,
        what: str,
    ) -> T:
        """Hand what arrives to ``work`` in a thread. It runs to its end, whatever becomes of the call.

        Args:
            work: gets the pieces, and an event that is set once the caller is gone: it then keeps nothing.
            what: is sent, for messages.
        """
        place, given_up = self.places.of(tenant), threading.Event()
        await place.acquire()
        pieces = from_loop(asyncio.get_running_loop(), data, what)
        working = self.executors.upload(work, pieces, given_up)

        def ended(done: asyncio.Future[Any]) -> None:
            place.release()
            if not done.cancelled():
                done.exception()  # was looked at, also where nobody waits any more

        working.add_done_callback(ended)
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            given_up.set()  # the thread sees it, at the latest before it would keep anything
            raise


def refuse_given_up(given_up: threading.Event, what: str) -> None:
    """Call it before something is kept.

    Raises:
        FutureCancelledError: the caller is gone.
    """
    if given_up.is_set():
        raise _given_up(what)


def from_loop(loop: asyncio.AbstractEventLoop, data: AsyncIterator[bytes], what: str) -> Iterator[bytes]:
    """What arrives on the loop, for a thread to read piece by piece.

    Raises:
        InvalidRequestError: it was waited for longer than what came allows: `PATIENCE_S`, and a second for each
            `SLOWEST_BYTES_PER_S`.
        FutureCancelledError: the caller is gone.
    """
    waited_s, received = 0.0, 0

    async def following() -> bytes | None:
        return await anext(data, None)

    while True:
        left_s = min(PATIENCE_S, PATIENCE_S + received / SLOWEST_BYTES_PER_S - waited_s)
        future, began_s = asyncio.run_coroutine_threadsafe(following(), loop), time.monotonic()
        try:
            piece = future.result(max(0.0, left_s))
        except TimeoutError:
            future.cancel()
            raise InvalidRequestError(
                f"the {what} comes too slowly: {received:,} bytes after {waited_s + left_s:.0f} s; send it again "
                "over a faster connection",
                field="data",
                constraint=f"at least {SLOWEST_BYTES_PER_S} bytes a second, pauses of at most {PATIENCE_S:.0f} s",
            ) from None
        except CancelledError:
            raise _given_up(what) from None
        waited_s += time.monotonic() - began_s
        if piece is None:
            return
        received += len(piece)
        if piece:
            yield piece


def _given_up(what: str) -> FutureCancelledError:
    return FutureCancelledError(f"the import of the {what} was given up by its caller; nothing of it was kept")

"""Connections of the HTTP listener: what one may cost before anybody has shown a key."""

from __future__ import annotations

import asyncio
import resource
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_BYTES = 64 * 1024  # of a request's first line and headers
HEADER_S = 10.0  # for all of them to arrive, from the connection's or their own first byte
MOST_CONNECTIONS = 2048


def most_connections() -> int:
    """How many there may be: half of the files that this process may open are the rest's."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, min(MOST_CONNECTIONS, files // 2)) if files > 0 else MOST_CONNECTIONS


def show(state: Any) -> None:
    """Note on a request's state that its connection's client has shown a key."""
    state.known = True


class Connection(H11Protocol):
    """One connection. Half a request is waited for a while; where there are too many, strangers leave first."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._deadline: asyncio.TimerHandle | None = None
        self._known, self._since = False, time.monotonic()
        self._watch()
        if self.limit_concurrency is not None and len(self.connections) >= self.limit_concurrency:
            strangers = [c for c in self.connections if isinstance(c, Connection) and not c.is_known()]
            if strangers:
                min(strangers, key=lambda c: c._since).abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        super().connection_lost(exc)
        self._rest()

    def data_received(self, data: bytes) -> None:
        """Take what came; what it leaves unfinished must end in time."""
        super().data_received(data)
        # A body that nobody reads any more, because the request was refused, counts as unfinished too.
        if self.conn.their_state is h11.IDLE or self.conn.our_state in (h11.DONE, h11.MUST_CLOSE):
            self._watch()
        else:
            self._rest()

    def is_known(self) -> bool:
        """Whether a key was shown here."""
        self._known = self._known or bool(self.scope and self.scope["state"].get("known"))
        return self._known

    def on_response_complete(self) -> None:
        """Remember whose connection it is."""
        self.is_known()
        super().on_response_complete()

    def abort(self) -> None:
        """Close at once; who is asked for nothing gets no answer."""
        self.connections.discard(self)
        self.transport.abort()

    def _watch(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_S, self.abort)

    def _rest(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

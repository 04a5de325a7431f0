"""Connections of the HTTP listener: how long half a request is waited for, and who leaves where there are many."""

from __future__ import annotations

import asyncio
import resource
import time
from collections import defaultdict
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_BYTES = 64 * 1024  # of a request's first line and headers
HEADER_S = 10.0  # for all of them to arrive, from the connection's or their own first byte
BODY_S = 60.0  # for so many bytes of a body, or its end, to arrive
BODY_BYTES = 64 * 1024
MOST_CONNECTIONS = 2048
SHARE = 4  # no key keeps more than this part of the connections once others want them


def most_connections() -> int:
    """How many there may be: half of the files that this process may open are the rest's."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, min(MOST_CONNECTIONS, files // 2)) if files > 0 else MOST_CONNECTIONS


def show(state: Any, key_id: str) -> None:
    """Note on a request's state which key its connection's client has shown."""
    state.key_id = key_id


class Connection(H11Protocol):
    """One connection. Half a request is waited for a while; where there are too many, strangers leave first."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._deadline: asyncio.TimerHandle | None = None
        self._came: int | None = None  # bytes of a body since its deadline was set; None: it is not a body's
        self._key_id, self._since = "", time.monotonic()
        self._watch(HEADER_S)
        if self.limit_concurrency is not None and len(self.connections) >= self.limit_concurrency:
            self._make_room(self.limit_concurrency // SHARE)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        super().connection_lost(exc)
        self._rest()

    def data_received(self, data: bytes) -> None:
        """Take what came; what it leaves unfinished must end in time."""
        super().data_received(data)
        # A body that nobody reads any more, because the request was refused, is waited for like a header.
        if self.conn.their_state is h11.IDLE or self.conn.our_state in (h11.DONE, h11.MUST_CLOSE):
            if self._deadline is None or self._came is not None:
                self._watch(HEADER_S)
        elif self.conn.their_state is h11.SEND_BODY:
            came = None if self._came is None else self._came + len(data)
            if came is None or came >= BODY_BYTES:
                self._watch(BODY_S)
                came = 0
            self._came = came
        else:
            self._rest()

    def key_id(self) -> str:
        """Of the key that was shown here last; empty for a stranger."""
        self._key_id = (self.scope and self.scope["state"].get("key_id")) or self._key_id
        return self._key_id

    def on_response_complete(self) -> None:
        """Remember whose connection it is."""
        self.key_id()
        super().on_response_complete()

    def abort(self) -> None:
        """Close at once; who is asked for nothing gets no answer."""
        self.connections.discard(self)
        self.transport.abort()

    def _make_room(self, share: int) -> None:
        """Put out a stranger, or one of the key that has most: half-sent bodies first, then the oldest."""
        of: defaultdict[str, list[Connection]] = defaultdict(list)
        for other in self.connections:
            if isinstance(other, Connection) and other is not self:
                of[other.key_id()].append(other)
        strangers, most = of.pop("", []), max(of.values(), key=len, default=[])
        # A few strangers may stay while a key has too much: who has just come had no time to show theirs.
        leaving = strangers if strangers and (len(strangers) > share or len(most) <= share) else most
        if leaving:
            min(leaving, key=lambda c: (c._came is None, c._since)).abort()

    def _late(self) -> None:
        if self._came is not None and self.flow.read_paused:
            self._deadline = self.loop.call_later(BODY_S, self._late)  # it is we who do not read
        else:
            self.abort()

    def _watch(self, seconds: float) -> None:
        self._rest()
        self._deadline = self.loop.call_later(seconds, self._late)

    def _rest(self) -> None:
        self._came = None
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

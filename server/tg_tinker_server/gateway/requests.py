"""One HTTP request as a handler sees it: who calls, the body under a limit, and where it is asked from."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import zstandard
from starlette.requests import ClientDisconnect, Request

from tg_tinker.errors import InvalidRequestError
from tg_tinker_server.config import LOOPBACK
from tg_tinker_server.gateway.errors import TooLargeError
from tg_tinker_server.gateway.messages import Message, read
from tg_tinker_server.service.caller import Caller

PROTOBUF = "application/x-protobuf"
SMALL_BYTES = 4 * 2**20  # of JSON that carries no tensors
TINY_BYTES = 2**18  # of JSON that carries a few names
LARGE_JSON = 2**16  # bytes from which reading leaves the event loop
MOST_CONTAINERS = 200_000  # lists and objects in one body: each costs far more memory and time than its two bytes
_UNDOING = ThreadPoolExecutor(1, "zstd")  # one at a time: each takes a window of up to 128 MiB beside what it gives
M = TypeVar("M", bound=Message)
T = TypeVar("T")


async def aside(size: int, work: Callable[[], T]) -> T:
    """Do what takes time in proportion to a body, beside the event loop if the body is large."""
    return await asyncio.to_thread(work) if size >= LARGE_JSON else work()


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpCall:
    """A request that was let in.

    Attributes:
        most_bytes: of a body, also once it is decompressed.
        zstd: whether compressed bodies were advertised.
    """

    caller: Caller
    request: Request
    most_bytes: int
    zstd: bool

    def part(self, name: str) -> str:
        """A part of the path."""
        return str(self.request.path_params[name])

    def number(self, name: str, default: int, *, most: int) -> int:
        """A number of the query string.

        Raises:
            InvalidRequestError: it is none.
        """
        text = self.request.query_params.get(name, str(default))
        if not (text.isascii() and text.isdecimal() and len(text) < 10):
            raise InvalidRequestError(f"{name} is not a number from 0", field=name, constraint="a number from 0")
        return min(int(text), most)

    @property
    def from_this_machine(self) -> bool:
        """Whether it came over loopback, and no proxy said otherwise."""
        client = self.request.client
        return client is not None and client.host in LOOPBACK

    @property
    def is_protobuf(self) -> bool:
        """Whether the body is a protobuf message."""
        return self.request.headers.get("content-type", "").partition(";")[0].strip().lower() == PROTOBUF

    @property
    def wants_protobuf(self) -> bool:
        """Whether the answer may be a protobuf message."""
        return PROTOBUF in self.request.headers.get("accept", "")

    async def message(self, kind: type[M], *, large: bool = False) -> M:
        """The body as a value; an empty one is an empty object.

        Raises:
            InvalidRequestError: it is not JSON, not such a value, or too large.
        """
        data = await self.json_body(large=large)
        return await aside(len(data), lambda: read(kind, parse_json(data)))

    async def json_body(self, *, large: bool = False) -> bytes:
        """The body of a request in JSON.

        Raises:
            InvalidRequestError: too large.
        """
        return await self.body(min(SMALL_BYTES if large else TINY_BYTES, self.most_bytes))

    async def body(self, limit: int | None = None) -> bytes:
        """The body, decompressed.

        Raises:
            InvalidRequestError: too large, or encoded in a way that was not advertised.
        """
        limit = self.most_bytes if limit is None else limit
        encoding = self.request.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("identity", "", *(("zstd",) if self.zstd else ())):
            raise InvalidRequestError(
                f"the content encoding {encoding[:40]!r} was not offered; send the body as it is",
                field="content-encoding",
                constraint="as client/config says",
            )
        pieces, size = [], 0
        try:
            async for piece in self.request.stream():
                size += len(piece)
                if size > limit:
                    raise _too_large(limit)
                pieces.append(piece)
        except ClientDisconnect as e:
            raise InvalidRequestError("the body ended early", field="body", constraint="whole") from e
        data = b"".join(pieces)
        if encoding != "zstd":
            return data
        # Beside the event loop whatever came: a few kilobytes may become as much as the limit.
        return await asyncio.get_running_loop().run_in_executor(_UNDOING, decompress, data, limit)


def decompress(data: bytes, limit: int) -> bytes:
    """Undo zstd; never takes much more memory than ``limit``.

    Raises:
        InvalidRequestError: not one zstd frame, or more than ``limit`` bytes.
    """
    pieces, size = [], 0
    try:
        with zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(data) as reader:
            while piece := reader.read(2**18):
                size += len(piece)
                if size > limit:
                    raise _too_large(limit)
                pieces.append(piece)
    except zstandard.ZstdError as e:
        raise InvalidRequestError("the body is not zstd", field="body", constraint="zstd") from e
    return b"".join(pieces)


def parse_json(data: bytes) -> Any:
    """JSON from bytes; nothing is an empty object.

    Raises:
        InvalidRequestError: it is not JSON, or has too many parts.
    """
    if data.count(b"[") + data.count(b"{") > MOST_CONTAINERS:
        raise InvalidRequestError(
            f"the body has over {MOST_CONTAINERS} lists and objects; send smaller requests",
            field="body",
            constraint=f"at most {MOST_CONTAINERS} lists and objects",
        )
    try:
        return json.loads(data) if data.strip() else {}
    except (ValueError, RecursionError) as e:
        raise InvalidRequestError("the body is not JSON", field="body", constraint="JSON") from e


def _too_large(limit: int) -> TooLargeError:
    return TooLargeError(
        f"the body is over the {limit} bytes of one request; send smaller batches",
        field="body",
        constraint=f"at most {limit} bytes",
    )

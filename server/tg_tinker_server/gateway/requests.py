"""One HTTP request as a handler sees it: who calls, the body under a limit, and where it is asked from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, TypeVar

import zstandard
from starlette.requests import ClientDisconnect, Request

from tg_tinker.errors import InvalidRequestError
from tg_tinker_server.gateway.errors import TooLargeError
from tg_tinker_server.gateway.messages import Message, read
from tg_tinker_server.service.caller import Caller

PROTOBUF = "application/x-protobuf"
SMALL_BYTES = 4 * 2**20  # of JSON that carries no tensors
M = TypeVar("M", bound=Message)


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
    def is_protobuf(self) -> bool:
        """Whether the body is a protobuf message."""
        return self.request.headers.get("content-type", "").partition(";")[0].strip().lower() == PROTOBUF

    @property
    def wants_protobuf(self) -> bool:
        """Whether the answer may be a protobuf message."""
        return PROTOBUF in self.request.headers.get("accept", "")

    async def message(self, kind: type[M], *, large: bool = False) -> M:
        """The body as a value."""
        return read(kind, await self.json(large=large))

    async def json(self, *, large: bool = False) -> Any:
        """The body as JSON; an empty one is an empty object.

        Raises:
            InvalidRequestError: it is not JSON, or too large.
        """
        data = await self.body(self.most_bytes if large else min(SMALL_BYTES, self.most_bytes))
        return parse_json(data)

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
        return decompress(data, limit) if encoding == "zstd" else data


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
        InvalidRequestError: it is not JSON.
    """
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

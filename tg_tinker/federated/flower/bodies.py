"""How much anybody may send to a SuperLink in one request.

Flower reads a request's body into memory before it looks at who sent it, so that strangers could fill the memory.
`LimitedBodies` stands before that: a body beyond what any request but an upload needs is read only for this computer
and for nodes that the coordinator registered. They prove themselves as to Flower itself: an ECDSA signature over the
time, in the request's headers, by a key of the list.
"""

from __future__ import annotations

import binascii
import time
from base64 import b64decode
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from datetime import datetime
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_public_key

STRANGERS_BYTES = 2**20
"""A body that Flower may read before it knows who sent it."""
_CLOCKS_S = 305.0  # Flower's own tolerance: TIMESTAMP_TOLERANCE and SYSTEM_TIME_TOLERANCE
_LONGEST_KEY = 2_000

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class LimitedBodies:
    """ASGI middleware: a request whose body is longer than its sender may send gets 413, and no more of it is read.

    Args:
        node_keys: of the registered nodes.
        largest: bytes of one body, from them and from this computer.
        trusted: whether a request comes from a process that may send that much unsigned.
        now: seconds since 1970.
    """

    def __init__(
        self,
        app: App,
        *,
        node_keys: Collection[EllipticCurvePublicKey],
        largest: int,
        trusted: Callable[[Scope], bool],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._app, self._largest, self._trusted, self._now = app, largest, trusted, now
        self._node_keys = list(node_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, counting its body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {bytes(name).lower(): bytes(value) for name, value in scope.get("headers", ())}
        announced = headers.get(b"content-length", b"0")
        size = int(announced) if announced.isdigit() and len(announced) < 20 else self._largest + 1
        most = STRANGERS_BYTES
        known = False
        refused = False

        def allowed(count: int) -> bool:
            nonlocal most, known
            if count > most and not known:  # the signature is looked at once, and only where it matters
                known = True
                if self._trusted(scope) or self._is_node(headers):
                    most = self._largest
            return count <= most

        async def refuse() -> None:
            nonlocal refused
            refused = True
            head = [(b"connection", b"close"), (b"content-type", b"text/plain")]
            await send({"type": "http.response.start", "status": 413, "headers": head})
            await send({"type": "http.response.body", "body": f"at most {most} bytes are taken".encode("ascii")})

        if not allowed(size):
            await refuse()
            return
        got = 0

        async def counted() -> Scope:
            nonlocal got
            if refused:
                return {"type": "http.disconnect"}
            message = await receive()
            if message["type"] == "http.request":
                got += len(message.get("body", b""))
                if not allowed(got):
                    await refuse()
                    return {"type": "http.disconnect"}
            return message

        async def unless_refused(message: Scope) -> None:
            if not refused:
                await send(message)

        try:
            await self._app(scope, counted, unless_refused)
        except Exception:
            if not refused:  # else it complains about the sender that went away
                raise

    def _is_node(self, headers: MutableMapping[bytes, bytes]) -> bool:
        """Whether a registered node signed the time, as Flower's `authenticate_node` reads it."""
        try:
            pem = b64decode(headers[b"flwr-public-key"], validate=True)
            if len(pem) > _LONGEST_KEY:
                return False
            key = load_pem_public_key(pem)
            if not isinstance(key, EllipticCurvePublicKey) or key not in self._node_keys:
                return False
            at = headers[b"flwr-timestamp"]
            if abs(datetime.fromisoformat(at.decode("ascii")).timestamp() - self._now()) > _CLOCKS_S:
                return False
            key.verify(b64decode(headers[b"flwr-signature"], validate=True), at, ECDSA(SHA256()))
        except (KeyError, ValueError, OverflowError, binascii.Error, InvalidSignature, UnsupportedAlgorithm):
            return False
        return True

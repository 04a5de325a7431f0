"""Long bodies are read from registered nodes and this computer only, and never more than the limit."""

from __future__ import annotations

import asyncio
import http.client
import ssl
import time
from base64 import b64encode
from collections.abc import MutableMapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from tests.tg_tinker.federated.flower.federation import Federation
from tg_tinker.federated.flower.bodies import STRANGERS_BYTES, LimitedBodies
from tg_tinker.federated.flower.superlink import SuperLink

NODE = ec.generate_private_key(ec.SECP384R1())
STRANGER = ec.generate_private_key(ec.SECP384R1())
NOW = 2_000_000_000.0
LARGEST = 4 * STRANGERS_BYTES


def signed(
    key: ec.EllipticCurvePrivateKey, *, at: float = NOW, of: ec.EllipticCurvePrivateKey | None = None
) -> dict[str, bytes]:
    """Headers as Flower's own client makes them, but for the time."""
    moment = datetime.fromtimestamp(at, UTC).isoformat().encode()
    return {
        "flwr-public-key": b64encode(public_key_to_bytes((of or key).public_key())),
        "flwr-timestamp": moment,
        "flwr-signature": b64encode(key.sign(moment, ec.ECDSA(SHA256()))),
    }


def post(
    headers: dict[str, Any], *, size: int, announced: int | None = None, trusted: bool = False, now: float = NOW
) -> tuple[list[int], int]:
    """The statuses that were sent, and how many bytes of the body were fetched."""
    statuses: list[int] = []
    fetched = 0

    async def app(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        while (message := await receive())["type"] == "http.request" and message["more_body"]:
            pass
        if message["type"] == "http.disconnect":
            raise RuntimeError("the client is gone")
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> dict[str, Any]:
        nonlocal fetched
        part = min(STRANGERS_BYTES // 2, size - fetched)
        fetched += part
        return {"type": "http.request", "body": bytes(part), "more_body": fetched < size}

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    raw = [(name.encode(), value) for name, value in headers.items()]
    if announced is not None:
        raw.append((b"Content-Length", str(announced).encode()))
    middleware = LimitedBodies(
        app, node_keys=[NODE.public_key()], largest=LARGEST, trusted=lambda _: trusted, now=lambda: now
    )
    asyncio.run(middleware({"type": "http", "path": "/v1/fleet/x", "headers": raw}, receive, send))
    return statuses, fetched


UNPROVED = {
    "none": {},
    "stranger": signed(STRANGER),
    "a node's key, another's signature": signed(STRANGER, of=NODE),
    "old": signed(NODE, at=NOW - 400),
    "of tomorrow": signed(NODE, at=NOW + 86_400),
    "no base64": {**signed(NODE), "flwr-signature": b"\xff"},
    "no time": {**signed(NODE), "flwr-timestamp": b"yesterday"},
    "no key": {**signed(NODE), "flwr-public-key": b64encode(b"key")},
}


@pytest.mark.parametrize("who", UNPROVED)
def test_of_strangers_a_mebibyte_is_read(who: str) -> None:
    assert post(UNPROVED[who], size=STRANGERS_BYTES) == ([200], STRANGERS_BYTES)
    assert post(UNPROVED[who], size=LARGEST, announced=LARGEST) == ([413], 0)
    statuses, fetched = post(UNPROVED[who], size=LARGEST)
    assert statuses == [413]
    assert STRANGERS_BYTES < fetched <= STRANGERS_BYTES * 3 // 2


@pytest.mark.parametrize("proof", [{"headers": signed(NODE)}, {"headers": {}, "trusted": True}])
def test_nodes_and_the_coordinator_may_send_up_to_the_limit(proof: dict[str, Any]) -> None:
    assert post(**proof, size=LARGEST, announced=LARGEST) == ([200], LARGEST)
    assert post(**proof, size=LARGEST + 1, announced=LARGEST + 1) == ([413], 0)
    assert post(**proof, size=LARGEST + 1)[0] == [413]


def test_an_announced_length_that_is_none_is_refused() -> None:
    for text in ("-1", "x", "1" * 30):
        assert post({**signed(NODE), "content-length": text.encode()}, size=10) == ([413], 0)


def flowers_headers(key: ec.EllipticCurvePrivateKey) -> dict[str, bytes]:
    """What Flower's own SuperNode adds to its requests."""
    request = httpx.Request("POST", "https://localhost/v1/fleet/push-object")
    context = ProtobufRequestContext("PushObject", PushObjectRequest(), request)
    NodeAuthHttpInterceptor(key, key.public_key()).intercept(context, lambda _: httpx.Response(200))
    return {n: v.encode() for n, v in request.headers.items() if n.startswith("flwr-")}


def test_what_flower_s_own_nodes_send_is_a_proof() -> None:
    now = time.time()
    assert post(flowers_headers(NODE), size=LARGEST, announced=LARGEST, now=now) == ([200], LARGEST)
    assert post(flowers_headers(STRANGER), size=LARGEST, announced=LARGEST, now=now) == ([413], 0)


def test_a_superlink_reads_long_bodies_of_its_nodes_only(tmp_path: Path) -> None:
    federation = Federation(tmp_path, ["berlin"])
    node = load_ssh_private_key((tmp_path / "berlin" / "node.key").read_bytes(), None)
    assert isinstance(node, ec.EllipticCurvePrivateKey)
    size = 3 * STRANGERS_BYTES
    trust = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
    with SuperLink(federation.coordinator().model_copy(update={"largest_body": size})):

        def status(headers: dict[str, bytes], announced: int, body: bytes) -> int:
            connection = http.client.HTTPSConnection("127.0.0.1", federation.port, context=trust, timeout=30)
            connection.putrequest("POST", "/v1/fleet/push-object")
            for name, value in {**headers, "content-type": b"application/x-protobuf"}.items():
                connection.putheader(name, value)
            connection.putheader("Content-Length", str(announced))
            connection.endheaders(body)
            try:
                return connection.getresponse().status
            finally:
                connection.close()

        assert status({}, size, b"") == 413  # before any of it is sent
        assert status(flowers_headers(STRANGER), size, b"") == 413
        assert status(flowers_headers(node), size + 1, b"") == 413
        assert status(flowers_headers(node), size, b"\xff" * size) in (400, 415, 422)  # Flower has read it

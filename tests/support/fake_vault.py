"""A server on this machine that speaks the part of HashiCorp Vault's transit API that we use.

It is not Vault, and no real one runs in the tests. Keys are versioned and, when asked for, derived from the context,
as the API documentation says.
"""

from __future__ import annotations

import base64
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF


class FakeVault:
    """One transit engine at ``/transit`` with keys by name."""

    def __init__(self, *, derived: bool) -> None:
        self.derived = derived
        self.token = "hvs.test"
        self.keys: dict[str, list[bytes]] = {"tg-tinker": [os.urandom(32)]}
        self.requests: list[str] = []
        self.url = ""

    def rotate(self, name: str) -> None:
        self.keys[name].append(os.urandom(32))

    def answer(self, path: str, token: str | None, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.requests.append(path)
        if token != self.token:
            return 403, {"errors": ["permission denied"]}
        version, mount, operation, name = path.strip("/").split("/")
        if (version, mount) != ("v1", "transit"):
            return 404, {"errors": ["no handler for route"]}
        if name not in self.keys:
            return 400, {"errors": ["encryption key not found"]}
        if operation == "encrypt":
            nonce = os.urandom(12)
            sealed = nonce + self._cipher(name, -1, body).encrypt(nonce, base64.b64decode(body["plaintext"]), None)
            return 200, {"data": {"ciphertext": f"vault:v{len(self.keys[name])}:{base64.b64encode(sealed).decode()}"}}
        try:
            _, number, encoded = body["ciphertext"].split(":")
            sealed = base64.b64decode(encoded)
            cipher = self._cipher(name, int(number[1:]) - 1, body)
            plain = cipher.decrypt(sealed[:12], sealed[12:], None)
        except (ValueError, IndexError, InvalidTag):
            return 400, {"errors": ["cipher: message authentication failed"]}
        return 200, {"data": {"plaintext": base64.b64encode(plain).decode()}}

    def _cipher(self, name: str, version: int, body: dict[str, Any]) -> AESGCM:
        key = self.keys[name][version]
        if self.derived:
            key = HKDF(SHA256(), 32, None, base64.b64decode(body["context"])).derive(key)
        return AESGCM(key)


@contextmanager
def running_vault(*, derived: bool = True) -> Iterator[FakeVault]:
    vault = FakeVault(derived=derived)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, reply = vault.answer(self.path, self.headers.get("X-Vault-Token"), body)
            data = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_PUT = do_POST  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    vault.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield vault
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

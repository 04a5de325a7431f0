"""The HTTP listener: uvicorn on the loop that serves gRPC, with its TLS files and its rule for plaintext."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator
from typing import Any

import uvicorn

from tg_tinker.errors import InvalidRequestError
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.gateway.connections import HEADER_BYTES, Connection, most_connections

BACKLOG = 2048
KEEP_ALIVE_S = 75  # longer than clients keep idle connections


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the whole server's."""
        yield


class HttpListener:
    """A bound listener. Create it on the loop that will serve it."""

    def __init__(self, config: ServerConfig, app: Any, *, port: int) -> None:
        host = config.host.strip("[]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # Named so that asyncio sees TCP and turns Nagle's algorithm off, which costs 40 ms with every answer.
        self._socket = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((host, port))
        except OSError as e:
            self._socket.close()
            raise InvalidRequestError(
                f"cannot listen on {config.host}:{port} for the Tinker API: {e.strerror}; choose another tinker_port",
                field="tinker_port",
                constraint="free",
            ) from e
        self.port = int(self._socket.getsockname()[1])
        scheme = "https" if config.tls_cert else "http"
        self.url = f"{scheme}://{config.host}:{self.port}"
        self._server = _Server(
            uvicorn.Config(
                app,
                loop="none",
                http=Connection,
                h11_max_incomplete_event_size=HEADER_BYTES,
                limit_concurrency=most_connections(),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_S,
                ssl_certfile=str(config.tls_cert) if config.tls_cert else None,
                ssl_keyfile=str(config.tls_key) if config.tls_key else None,
                ssl_ca_certs=str(config.tls_client_ca) if config.tls_client_ca else None,
                ssl_cert_reqs=ssl.CERT_REQUIRED if config.tls_client_ca else ssl.CERT_NONE,
            )
        )
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Accept calls.

        Raises:
            InvalidRequestError: the TLS files cannot be used.
        """
        try:
            self._server.config.load()
        except (OSError, ssl.SSLError) as e:
            self._socket.close()
            raise InvalidRequestError(
                "the TLS files cannot be read, are not PEM, or do not belong together; mend tls_cert and tls_key",
                field="tls_cert",
                constraint="PEM, certificate and key of one another",
            ) from e
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]), name="tinker-http")
        while not self._server.started and not self._task.done():
            await asyncio.sleep(0.005)
        if self._task.done():
            await self._task

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, give running ones ``grace_s`` seconds."""
        if self._task is None:
            self._socket.close()
            return
        self._server.should_exit = True
        done, _ = await asyncio.wait({self._task}, timeout=max(0.2, grace_s))
        if not done:
            self._server.force_exit = True
            await asyncio.wait({self._task}, timeout=5.0)
        self._socket.close()

"""The connection to one server: its settings, who the server is, what it can do."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, Self

from tg_tinker._endpoint import DEFAULT_RETRY_COUNT, DEFAULT_TIMEOUT_S, parse_base_url, read_tls_files, resolve
from tg_tinker._pressure import QueueState
from tg_tinker._transport import Transport
from tg_tinker.errors import ServerError
from tg_tinker.log_guard import LogGuard
from tg_tinker.session import Session
from tg_tinker.transparency.pins import Pins
from tg_tinker.transparency.receipts import Receipts
from tg_tinker.transparency.watch import Watch
from tg_tinker.types import Capabilities, ServiceConfig
from tg_tinker.wire import requests
from tg_tinker.wire.runs import API_VERSION, capabilities_from_proto


class Connection:
    """One server, one key. Nothing is sent before the first call."""

    def __init__(
        self,
        api_key: str | None = None,
        base_url: str | None = None,
        tenant_id: str | None = None,
        timeout: float = DEFAULT_TIMEOUT_S,
        retry_count: int = DEFAULT_RETRY_COUNT,
        *,
        user_metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Settings that are not given come from the environment.

        Args:
            api_key: or TG_TINKER_API_KEY.
            base_url: or TG_TINKER_BASE_URL; host:port (this machine), grpc://, grpcs://, http:// or https://.
                Default localhost:50051.
            tenant_id: or TG_TINKER_TENANT_ID; checked against the key's tenant.
            timeout: or TG_TINKER_TIMEOUT; seconds that a server reached before may be away, and that creating a
                run may take. Waiting for results has its own timeouts.
            retry_count: or TG_TINKER_RETRY_COUNT; repeats when the server was never reached or says "too many
                requests". 0 repeats nothing.
            user_metadata: added to the metadata of every run created here.

        Raises:
            InvalidRequestError: a setting that cannot be, named; among them plaintext to another machine.
        """
        self._config = resolve(
            api_key=api_key, base_url=base_url, tenant_id=tenant_id, timeout=timeout, retry_count=retry_count
        )
        self._transport = Transport(self._config, tls=read_tls_files() if self._config.tls else None)
        self._user_metadata = dict(user_metadata or {})
        self._lock = threading.Lock()
        self._sessions: weakref.WeakValueDictionary[str, Session] = weakref.WeakValueDictionary()
        self._capabilities: Capabilities | None = None
        self._guard: LogGuard | None = None

    @property
    def config(self) -> ServiceConfig:
        """The settings in use; the key is not shown."""
        return self._config

    @property
    def tenant_id(self) -> str:
        """The tenant that the key belongs to."""
        return self._config.tenant_id or self._handshake().tenant_id

    @property
    def queue_state(self) -> QueueState:
        """Whether the server takes work, as it said last. Waiting calls go on by themselves."""
        return self._transport.pressure.state

    def get_server_capabilities(self) -> Capabilities:
        """What the server can do.

        Raises:
            ServerError: it speaks another major version of the protocol.
        """
        request = requests.capabilities(version("tg-tinker"))
        capabilities = capabilities_from_proto(self._transport.call(request))
        if capabilities.api_version.partition(".")[0] != API_VERSION.partition(".")[0]:
            raise ServerError(
                f"the server speaks protocol {capabilities.api_version} and this client {API_VERSION}: install the "
                f"version of tg-tinker that fits the server ({capabilities.server_version})",
                details={"server": capabilities.api_version, "client": API_VERSION},
            )
        self._capabilities = capabilities
        return capabilities

    def close(self, *, wait_s: float = 60.0) -> None:
        """End the connection. Calls already made are handed to the server first, for up to ``wait_s`` seconds."""
        deadline = time.monotonic() + wait_s
        for session in list(self._sessions.values()):
            session.close(wait_s=max(0.0, deadline - time.monotonic()))
        if self._guard is not None:
            self._guard.close()
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def _handshake(self) -> Capabilities:
        """Who the server is, and that its log continues what was seen of it."""
        capabilities = self._capabilities or self.get_server_capabilities()
        self._guarded(capabilities.tenant_id).check()
        return capabilities

    def _guarded(self, tenant: str) -> LogGuard:
        with self._lock:
            if self._guard is None:
                endpoint = parse_base_url(self._config.base_url)
                watch = Watch(
                    Pins.of_user(),
                    address=endpoint.target,
                    tenant=tenant,
                    loopback=endpoint.loopback,
                    receipts=Receipts.of_user(),
                )
                self._guard = LogGuard(self._transport, watch)
            return self._guard

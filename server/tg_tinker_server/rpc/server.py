"""The gRPC server: every method of the protocol bound to its servicer, health, reflection, TLS, drain."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tg_tinker.errors import InvalidRequestError
from tg_tinker.wire.methods import Method, methods
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.rpc.endpoint import Endpoint

UNSPECIFIED = "UNSPECIFIED"


def bind(servicers: Iterable[Any], endpoint: Endpoint) -> list[grpc.GenericRpcHandler[bytes, bytes]]:
    """One handler per method of the protocol.

    Raises:
        RuntimeError: a method without an auth scope, or without a servicer. The server does not start.
    """
    functions: dict[str, Callable[..., Any]] = {}
    for servicer in servicers:
        functions.update({name: getattr(servicer, name) for name in dir(servicer) if name[0].isupper()})
    services: dict[str, dict[str, grpc.RpcMethodHandler[bytes, bytes]]] = {}
    for method in methods():
        require_scope(method)
        if method.name not in functions:
            raise RuntimeError(f"{method.path} has no servicer")
        handler = endpoint.handler(method, functions[method.name])
        services.setdefault(method.service, {})[method.name] = handler
    return [grpc.method_handlers_generic_handler(name, table) for name, table in services.items()]


def require_scope(method: Method) -> None:
    """Refuse a method that does not say who may call it."""
    if method.scope == UNSPECIFIED:
        raise RuntimeError(f"{method.path} has no auth scope; add `option (scope)` to it in proto/")


class GrpcServer:
    """A bound, started listener. Create it on the event loop that will serve it."""

    def __init__(self, config: ServerConfig, servicers: Iterable[Any], endpoint: Endpoint) -> None:
        limit = config.max_request_bytes
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", limit),
                ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a lottery
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
            ]
        )
        handlers = bind(servicers, endpoint)
        self._server.add_generic_rpc_handlers(tuple(handlers))
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = sorted({m.service for m in methods()})
        reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)
        self._names = ["", *names]
        address = f"{config.host}:{config.port}"
        try:
            self.port = (
                self._server.add_secure_port(address, _credentials(config))
                if config.tls_cert
                else self._server.add_insecure_port(address)
            )
        except RuntimeError as e:
            raise InvalidRequestError(
                f"cannot listen on {address}: is another server running there, or does the host not exist?"
                + (" Or the TLS files are not PEM or do not belong together." if config.tls_cert else "")
                + " Choose another port or mend that",
                field="port",
                constraint="free",
            ) from e
        self.address = f"{config.host}:{self.port}"

    async def start(self) -> None:
        """Accept calls and say so to health checks."""
        await self._server.start()
        for name in self._names:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def stop_accepting(self) -> None:
        """Tell health checks to send nobody here any more."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, give running ones ``grace_s`` seconds."""
        await self._server.stop(grace_s)


def _credentials(config: ServerConfig) -> grpc.ServerCredentials:
    assert config.tls_cert is not None
    assert config.tls_key is not None
    try:
        pair = (config.tls_key.read_bytes(), config.tls_cert.read_bytes())
        ca = config.tls_client_ca.read_bytes() if config.tls_client_ca else None
    except OSError as e:
        raise InvalidRequestError(f"cannot read a TLS file: {e}", field="tls_cert", constraint="readable PEM") from e
    return grpc.ssl_server_credentials([pair], root_certificates=ca, require_client_auth=ca is not None)

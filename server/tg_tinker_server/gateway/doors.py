"""What every request goes through: key, scope, one mapping of errors, one log line. Every route has a scope."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from tg_tinker.errors import AuthenticationError, InvalidRequestError, ServerError, TGTinkerError
from tg_tinker_server.gateway.connections import show
from tg_tinker_server.gateway.errors import refusal
from tg_tinker_server.gateway.requests import HttpCall
from tg_tinker_server.service.caller import HOW_TO_GET_A_KEY, Authenticator, Caller
from tg_tinker_server.service.crashes import place_of
from tg_tinker_server.service.executors import Executors

log = structlog.get_logger()
PREFIX = "/api/v1/"
KEY_PREFIX = "tml-"
PUBLIC = "PUBLIC"
_NOBODY = Caller(tenant="", key_id="", scopes=frozenset())
Handler = Callable[[HttpCall], Awaitable[Response]]

# What a key must be allowed to do, for every route. The server does not start when one is missing here.
SCOPES: Mapping[str, str] = {
    "GET healthz": PUBLIC,
    "GET external/{token}/{file}": PUBLIC,  # the token is signed, names one file, and expires
    "POST client/config": "READ",
    "POST client/dynamic_config": "READ",
    "POST auth/token": "READ",
    "GET auth/apikey/me": "READ",
    "DELETE auth/apikey/me": "READ",
    "POST telemetry": "READ",
    "GET get_server_capabilities": "READ",
    "POST create_session": "READ",
    "POST session_heartbeat": "READ",
    "POST sessions/{session}/finish": "READ",
    "POST sessions/search": "READ",
    "PUT sessions/{session}/project": "READ",
    "GET sessions/{session}/trace_export": "READ",
    "GET sessions": "READ",
    "GET sessions/{session}": "READ",
    "POST create_model": "TRAIN",
    "POST get_info": "READ",
    "POST load_weights": "TRAIN",
    "POST forward_backward": "TRAIN",
    "POST forward": "TRAIN",
    "POST optim_step": "TRAIN",
    "POST save_weights": "TRAIN",
    "POST save_weights_for_sampler": "TRAIN",
    "POST save_weights_external": "EXPORT",
    "POST create_custom_loss": "TRAIN",
    "POST weights_info": "READ",
    "POST copy_weights": "TRAIN",
    "POST retrieve_future": "READ",
    "POST retrieve_futures": "SAMPLE",
    "POST cancel_future": "SAMPLE",
    "POST create_sampling_session": "SAMPLE",
    "POST join_sampling_session": "SAMPLE",
    "GET samplers/{sampler}": "READ",
    "POST asample": "SAMPLE",
    "GET training_runs": "READ",
    "GET training_runs/{model}": "READ",
    "GET training_runs/{model}/checkpoints": "READ",
    "DELETE training_runs/{model}/checkpoints/{kind}/{name}": "TRAIN",
    "POST training_runs/{model}/checkpoints/{kind}/{name}/publish": "TRAIN",
    "DELETE training_runs/{model}/checkpoints/{kind}/{name}/publish": "TRAIN",
    "PUT training_runs/{model}/checkpoints/{kind}/{name}/ttl": "TRAIN",
    "GET training_runs/{model}/checkpoints/{kind}/{name}/external_weights_urls": "EXPORT",
    "GET training_runs/{model}/checkpoints/{kind}/{name}/archive": "EXPORT",
    "GET checkpoints": "READ",
    "GET audit": "AUDIT",
    "GET billing/usage/events": "READ",
    "GET billing/usage/checkpoints/current": "READ",
}


@dataclass(frozen=True, slots=True)
class Doors:
    """Makes routes of handlers."""

    authenticator: Authenticator
    executors: Executors
    most_bytes: int
    zstd: bool

    def routes(self, handlers: Mapping[str, Handler]) -> list[BaseRoute]:
        """One route for each handler, named ``"METHOD path"``.

        Raises:
            RuntimeError: a route without a scope, or a scope without a route. The server does not start.
        """
        if nameless := sorted(set(handlers) ^ set(SCOPES)):
            raise RuntimeError(f"routes and scopes of the Tinker protocol do not match: {', '.join(nameless)}")
        made: list[BaseRoute] = []
        for name, handler in handlers.items():
            method, _, path = name.partition(" ")
            made.append(Route(PREFIX + path, self._door(name, handler), methods=[method]))
        return made

    def _door(self, name: str, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        async def door(request: Request) -> Response:
            started = time.perf_counter()
            try:
                caller = await self._caller(request, SCOPES[name])
                call = HttpCall(caller=caller, request=request, most_bytes=self.most_bytes, zstd=self.zstd)
                response = await handler(call)
            except Exception as e:  # noqa: BLE001 - the one place where errors become statuses
                response = refusal(_known(name, e))
            # Never the body, the query or a header: keys and ids of people travel there.
            log.debug(
                "http", route=name, status=response.status_code, ms=round((time.perf_counter() - started) * 1e3, 2)
            )
            return response

        return door

    async def _caller(self, request: Request, scope: str) -> Caller:
        if scope == PUBLIC:
            return _NOBODY
        text = request.headers.get("x-api-key", "")
        if not text:
            raise AuthenticationError(f"no API key was sent in X-API-Key; {HOW_TO_GET_A_KEY}")
        if not text.startswith(KEY_PREFIX):
            raise AuthenticationError(
                "this server takes API keys that begin with tml-: put tml- before the key that "
                "`tg-tinker keys create` showed, and set TINKER_API_KEY to that"
            )
        token = text.removeprefix(KEY_PREFIX)
        caller = self.authenticator.cached(token, None)
        if caller is None:
            caller = await self.executors.io(self.authenticator.authenticate, token, None)
        show(request.state, caller.key_id)
        caller.require(scope)
        return caller


def _known(name: str, error: Exception) -> TGTinkerError:
    if isinstance(error, asyncio.CancelledError):
        raise error
    if isinstance(error, TGTinkerError):
        log.info("http_refused", route=name, error=error.code)
        return error
    log.error("http_crashed", route=name, error=type(error).__name__, at=place_of(error))
    return ServerError("the request failed inside the server; tell its operator when it was")


async def not_here(request: Request, _error: Exception) -> Response:
    """What no route takes."""
    return refusal(
        InvalidRequestError(
            f"{request.method} {request.url.path[:200]} is not part of what this server offers",
            field="path",
            constraint="a known path",
        )
    )

"""What every RPC goes through: request id, key, scope, decoding, one mapping of errors, one log line."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
import structlog
from google.protobuf.message import DecodeError, Message

from tg_tinker.errors import AuthenticationError, InvalidRequestError, ServerError, TGTinkerError
from tg_tinker.wire.methods import Method
from tg_tinker.wire.status import error_to_status, grpc_code
from tg_tinker_server.service.caller import HOW_TO_GET_A_KEY, Authenticator, Caller
from tg_tinker_server.service.crashes import place_of
from tg_tinker_server.service.executors import Executors

log = structlog.get_logger()
STATUS_KEY = "grpc-status-details-bin"
PUBLIC = "PUBLIC"
SMALL_REQUEST_BYTES = 4 * 2**20  # reading a request takes the event loop; only tensors are cheap to read
CARRIES_TENSORS = ("ForwardBackward", "AddUpdates", "SampleTokens")
_REQUEST_ID = re.compile(r"^[A-Za-z0-9._-]{1,64}$")
_NOBODY = Caller(tenant="", key_id="", scopes=frozenset())


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request as a servicer sees it: who, under which id, and the bytes as they arrived."""

    caller: Caller
    request_id: str
    payload: bytes

    @property
    def tenant(self) -> str:
        """Whose data this call may touch."""
        return self.caller.tenant


UnaryHandler = Callable[[Call, Any], Awaitable[Message]]
StreamHandler = Callable[[Call, Any], AsyncIterator[Message]]
UploadHandler = Callable[[Call, AsyncIterator[Any]], Awaitable[Message]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Wraps handlers for grpc. Requests are decoded here, so that garbage is the caller's error, not ours."""

    authenticator: Authenticator
    executors: Executors

    def handler(self, method: Method, function: Callable[..., Any]) -> grpc.RpcMethodHandler[bytes, bytes]:
        """The grpc handler of one method."""
        if method.client_streaming:
            return grpc.stream_unary_rpc_method_handler(self._upload(method, function))
        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(self._stream(method, function))
        return grpc.unary_unary_rpc_method_handler(self._unary(method, function))

    def _unary(self, method: Method, function: UnaryHandler) -> Callable[..., Awaitable[bytes]]:
        async def call(payload: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            started = time.perf_counter()
            request_id = _request_id(context)
            try:
                checked, request = await self._admit(method, payload, context, request_id)
                reply = await function(checked, request)
            except Exception as e:  # noqa: BLE001 - the one place where errors become statuses
                await _abort(context, method, e, request_id)
            log.debug("rpc", method=method.name, request_id=request_id, ms=_ms(started), code="OK")
            return reply.SerializeToString()

        return call

    def _stream(self, method: Method, function: StreamHandler) -> Callable[..., AsyncIterator[bytes]]:
        async def call(payload: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> AsyncIterator[bytes]:
            started = time.perf_counter()
            request_id = _request_id(context)
            try:
                checked, request = await self._admit(method, payload, context, request_id)
                async for reply in function(checked, request):
                    yield reply.SerializeToString()
            except Exception as e:  # noqa: BLE001 - the one place where errors become statuses
                await _abort(context, method, e, request_id)
            log.debug("rpc", method=method.name, request_id=request_id, ms=_ms(started), code="OK")

        return call

    def _upload(self, method: Method, function: UploadHandler) -> Callable[..., Awaitable[bytes]]:
        async def call(payloads: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            started = time.perf_counter()
            request_id = _request_id(context)
            try:
                caller = await self._caller(method, context)
                requests = (self._request(method, payload) async for payload in payloads)
                reply = await function(Call(caller=caller, request_id=request_id, payload=b""), requests)
            except Exception as e:  # noqa: BLE001 - the one place where errors become statuses
                await _abort(context, method, e, request_id)
            log.debug("rpc", method=method.name, request_id=request_id, ms=_ms(started), code="OK")
            return reply.SerializeToString()

        return call

    async def _admit(
        self, method: Method, payload: bytes, context: grpc.aio.ServicerContext[bytes, bytes], request_id: str
    ) -> tuple[Call, Message]:
        caller = await self._caller(method, context)
        return Call(caller=caller, request_id=request_id, payload=payload), self._request(method, payload)

    async def _caller(self, method: Method, context: grpc.aio.ServicerContext[bytes, bytes]) -> Caller:
        if method.scope == PUBLIC:
            return _NOBODY
        caller = await self._authenticate(context)
        caller.require(method.scope)
        return caller

    @staticmethod
    def _request(method: Method, payload: bytes) -> Message:
        if len(payload) > SMALL_REQUEST_BYTES and method.name not in CARRIES_TENSORS:
            raise InvalidRequestError(
                f"{method.name} carries {len(payload)} bytes, over the {SMALL_REQUEST_BYTES} of one call; split it",
                field="request",
                constraint=f"at most {SMALL_REQUEST_BYTES} bytes",
            )
        request = method.request()
        try:
            request.ParseFromString(payload)
        except DecodeError as e:
            raise InvalidRequestError(
                f"the request is not a {method.request.DESCRIPTOR.name} message",
                field="request",
                constraint=method.request.DESCRIPTOR.full_name,
            ) from e
        return request

    async def _authenticate(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> Caller:
        metadata = _metadata(context)
        scheme, _, token = metadata.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise AuthenticationError(f"no API key was sent; {HOW_TO_GET_A_KEY}")
        tenant = metadata.get("x-tenant-id")
        known = self.authenticator.cached(token, tenant)
        if known is not None:
            return known
        return await self.executors.io(self.authenticator.authenticate, token, tenant)


def _metadata(context: grpc.aio.ServicerContext[bytes, bytes]) -> dict[str, str]:
    return {k: v for k, v in context.invocation_metadata() or () if isinstance(v, str)}


def _request_id(context: grpc.aio.ServicerContext[bytes, bytes]) -> str:
    given = _metadata(context).get("x-request-id", "")
    return given if _REQUEST_ID.match(given) else secrets.token_hex(8)


def _ms(started: float) -> float:
    return round((time.perf_counter() - started) * 1e3, 2)


async def _abort(
    context: grpc.aio.ServicerContext[bytes, bytes], method: Method, error: Exception, request_id: str
) -> NoReturn:
    if isinstance(error, asyncio.CancelledError):
        raise error
    if not isinstance(error, TGTinkerError):
        log.error(
            "rpc_crashed", method=method.name, request_id=request_id, error=type(error).__name__, at=place_of(error)
        )
        error = ServerError("the request failed inside the server; quote the request id to its operator")
    error.request_id = request_id
    status = error_to_status(error)
    code = grpc_code(error)
    log.info("rpc", method=method.name, request_id=request_id, code=code.name, error=error.code)
    # Both copies of the message travel in metadata, which peers limit to 8 KiB.
    short = error.message.encode("ascii", "replace").decode()[:500]
    await context.abort(code, short, trailing_metadata=((STATUS_KEY, status.SerializeToString()),))
    raise AssertionError("abort does not return")

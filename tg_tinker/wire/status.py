"""The error table: which error class is which gRPC status, in both directions.

A status carries, as google.rpc details, ErrorInfo (the class's code, and its values as JSON), and besides
BadRequest, RetryInfo and RequestInfo for tools that know those. Values that hold no content only: see errors.py.
"""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2

from tg_tinker.errors import (
    AuthenticationError,
    AuthorizationError,
    DPBudgetExceededError,
    DPUnsupportedError,
    FederationRefusedError,
    FutureCancelledError,
    FutureTimeoutError,
    InvalidRequestError,
    LogVerificationError,
    RateLimitedError,
    ResourceNotFoundError,
    ServerError,
    TGTinkerError,
)

STATUS_KEY = "grpc-status-details-bin"
DOMAIN = "tg-tinker"
# What a connection that breaks under a call looks like, besides UNAVAILABLE.
BROKEN = (
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.ABORTED,
)
_MAX_MESSAGE = 1_000  # bytes; trailing metadata is limited to 8 KiB by default
_MAX_DETAILS = 3_000

# One row per class: its status, and the values its constructor takes.
TABLE: dict[type[TGTinkerError], tuple[grpc.StatusCode, tuple[str, ...]]] = {
    AuthenticationError: (grpc.StatusCode.UNAUTHENTICATED, ()),
    AuthorizationError: (grpc.StatusCode.PERMISSION_DENIED, ()),
    RateLimitedError: (grpc.StatusCode.RESOURCE_EXHAUSTED, ("retry_after",)),
    InvalidRequestError: (grpc.StatusCode.INVALID_ARGUMENT, ("field", "constraint")),
    DPUnsupportedError: (
        grpc.StatusCode.UNIMPLEMENTED,
        ("feature", "reason", "alternative", "field", "constraint"),
    ),
    ResourceNotFoundError: (grpc.StatusCode.NOT_FOUND, ("resource_type", "resource_id")),
    DPBudgetExceededError: (
        grpc.StatusCode.FAILED_PRECONDITION,
        ("current_epsilon", "max_epsilon", "delta"),
    ),
    FutureTimeoutError: (grpc.StatusCode.DEADLINE_EXCEEDED, ("future_id", "timeout")),
    FutureCancelledError: (grpc.StatusCode.CANCELLED, ("future_id",)),
    LogVerificationError: (grpc.StatusCode.DATA_LOSS, ("kind",)),
    FederationRefusedError: (grpc.StatusCode.OUT_OF_RANGE, ("reason",)),
    ServerError: (grpc.StatusCode.INTERNAL, ()),
    TGTinkerError: (grpc.StatusCode.UNKNOWN, ()),
}
_BY_CODE = {cls.code: cls for cls in TABLE}
# A status without our details comes from grpc itself or from a proxy.
_BARE: dict[int, type[TGTinkerError]] = {
    code_pb2.UNAUTHENTICATED: AuthenticationError,
    code_pb2.PERMISSION_DENIED: AuthorizationError,
    code_pb2.RESOURCE_EXHAUSTED: RateLimitedError,
    code_pb2.INVALID_ARGUMENT: InvalidRequestError,
    code_pb2.NOT_FOUND: ResourceNotFoundError,
}


def grpc_code(error: TGTinkerError) -> grpc.StatusCode:
    """The status of an error: of its class, or of the nearest class above that has a row.

    A ``ServerError`` with ``details={"retry": True}`` is UNAVAILABLE: nothing was done, and the client's
    transport sends the same request again by itself. Use it when the server is shutting down.
    """
    if isinstance(error, ServerError) and error.details.get("retry") is True:
        return grpc.StatusCode.UNAVAILABLE
    row = next(TABLE[cls] for cls in type(error).__mro__ if cls in TABLE)
    return row[0]


def error_to_status(error: TGTinkerError) -> status_pb2.Status:
    """The error as google.rpc.Status, with everything needed to make it again on the other side."""
    message = error.message.encode()[:_MAX_MESSAGE].decode(errors="ignore")
    status = status_pb2.Status(code=grpc_code(error).value[0], message=message)
    info = error_details_pb2.ErrorInfo(reason=error.code, domain=DOMAIN)
    details = json.dumps(error.details, default=str)
    if len(details) > _MAX_DETAILS:
        names = next(TABLE[cls][1] for cls in type(error).__mro__ if cls in TABLE)
        kept = {k: _shortened(v) for k, v in error.details.items() if k in names}
        details = json.dumps(kept, default=str)
    info.metadata["details"] = details
    status.details.add().Pack(info)
    if isinstance(error, InvalidRequestError):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field[:200], description=error.constraint[:200]
        )
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, RateLimitedError) and math.isfinite(error.retry_after):
        delay = Duration()
        delay.FromNanoseconds(int(min(max(error.retry_after, 0.0), 3600.0) * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    if error.request_id:
        status.details.add().Pack(error_details_pb2.RequestInfo(request_id=error.request_id))
    return status


def error_from_status(status: status_pb2.Status) -> TGTinkerError:
    """The error a status stands for; a status without our details becomes the class nearest to its code."""
    reason, details, request_id, retry_after = "", {}, None, None
    for packed in status.details:
        info, request, retry = (
            error_details_pb2.ErrorInfo(),
            error_details_pb2.RequestInfo(),
            error_details_pb2.RetryInfo(),
        )
        try:
            if packed.Unpack(info) and info.domain == DOMAIN:
                reason, details = info.reason, _json_object(info.metadata.get("details", ""))
            elif packed.Unpack(request):
                request_id = request.request_id
            elif packed.Unpack(retry):
                retry_after = retry.retry_delay.ToNanoseconds() / 1e9
        except DecodeError:
            continue  # a detail we cannot read adds nothing; the code and the message still stand
    cls = _BY_CODE.get(reason) or _BARE.get(status.code, ServerError)
    values: dict[str, Any] = {k: details[k] for k in TABLE[cls][1] if k in details}
    if cls is RateLimitedError and "retry_after" not in values and retry_after is not None:
        values["retry_after"] = retry_after
    rest = {k: v for k, v in details.items() if k not in TABLE[cls][1]}
    return cls(status.message, details=rest, request_id=request_id, **values)


def is_ours(status: status_pb2.Status) -> bool:
    """Whether a TG-Tinker server wrote this status, rather than grpc or something on the way."""
    info = error_details_pb2.ErrorInfo()
    return any(d.Is(info.DESCRIPTOR) and d.Unpack(info) and info.domain == DOMAIN for d in status.details)


def failure_of(rpc: Any, request_id: str) -> tuple[grpc.StatusCode, TGTinkerError, bool]:
    """A failed call (a grpc.RpcError, or a grpc.Future): its status, the error, whether a TG-Tinker server said it.

    Args:
        rpc: has code(), details() and trailing_metadata().
        request_id: what we sent; the error names it when the server did not.
    """
    code = rpc.code()
    status = status_pb2.Status(code=code.value[0], message=rpc.details() or code.name)
    for key, value in rpc.trailing_metadata() or ():
        if key == STATUS_KEY:
            with contextlib.suppress(DecodeError):  # the bare code and text still stand
                status = status_pb2.Status.FromString(value)
    ours = is_ours(status)
    error = error_from_status(status)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and not ours and "larger than max" in status.message:
        error = InvalidRequestError(
            "the message is larger than the server accepts; split the batch into several forward_backward calls",
            field="batch",
            constraint="max_request_bytes of get_server_capabilities()",
        )
    elif code is grpc.StatusCode.UNIMPLEMENTED and not ours:
        error = ServerError("the server does not know this call: client and server versions differ, update the older")
    error.request_id = error.request_id or request_id
    return code, error, ours


def is_unreachable(code: grpc.StatusCode, ours: bool) -> bool:
    """Whether a failure says nothing about the request, so that sending it again is the way to know."""
    if code is grpc.StatusCode.UNAVAILABLE:
        return True
    return not ours and (code is grpc.StatusCode.DEADLINE_EXCEEDED or code in BROKEN)


def _shortened(value: Any) -> Any:
    return value[:400] if isinstance(value, str) else value


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}

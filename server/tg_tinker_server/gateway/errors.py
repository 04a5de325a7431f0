"""How errors are told over HTTP: as a status where a request is refused, as a failed future where it was accepted."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from tg_tinker.errors import (
    AuthenticationError,
    AuthorizationError,
    FutureCancelledError,
    InvalidRequestError,
    RateLimitedError,
    ResourceNotFoundError,
    ServerError,
    TGTinkerError,
)

# The official client retries 408, 409, 429 and 5xx for minutes; everything else it tells its user at once.
STATUS: dict[type[TGTinkerError], int] = {
    AuthenticationError: 401,
    AuthorizationError: 403,
    ResourceNotFoundError: 404,
    RateLimitedError: 429,
    InvalidRequestError: 400,
    ServerError: 500,
    TGTinkerError: 400,
}


class TooLargeError(InvalidRequestError):
    """A body over the limit."""


def bare(error: TGTinkerError) -> TGTinkerError:
    """An error that is told or kept, without the frames behind it: they would keep the request's body.

    Every error passes here when it is told, also one that was kept and raised again on behalf of another request.
    """
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error


def status_of(error: TGTinkerError) -> int:
    """The HTTP status of an error."""
    if isinstance(error, TooLargeError):
        return 413
    if isinstance(error, ServerError) and error.details.get("retry") is True:
        return 503
    return next(STATUS[c] for c in type(error).__mro__ if c in STATUS)


def refusal(error: TGTinkerError) -> JSONResponse:
    """A refused request; the official client shows ``detail`` to its user word for word."""
    status = status_of(bare(error))
    headers = {}
    if isinstance(error, RateLimitedError):
        headers["Retry-After"] = str(max(1, round(min(error.retry_after, 60.0))))
    if status == 500:
        headers["x-should-retry"] = "false"  # a defect of ours: the same request fails again
    return JSONResponse({"detail": error.message, "code": error.code}, status_code=status, headers=headers)


def failure(error: TGTinkerError) -> dict[str, Any]:
    """A failed future: final, whatever the category."""
    ours = isinstance(bare(error), ServerError) and not isinstance(error, FutureCancelledError)
    return {"error": error.message, "category": "server" if ours else "user"}

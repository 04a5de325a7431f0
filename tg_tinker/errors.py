"""Every error a user can catch.

    TGTinkerError                 code, message, details, request_id
    ├── AuthenticationError       no key, or a key the server does not know
    ├── AuthorizationError        a valid key that may not do this
    ├── RateLimitedError          too many requests or a full queue; retry_after in seconds
    ├── InvalidRequestError       field and constraint say what was wrong
    │   └── DPUnsupportedError    would break the privacy guarantee; feature, reason, alternative
    ├── ResourceNotFoundError     resource_type, resource_id
    ├── DPBudgetExceededError     current_epsilon, max_epsilon, delta
    ├── FutureTimeoutError        future_id, timeout; the operation goes on
    ├── FutureCancelledError      future_id
    ├── LogVerificationError      the server's log does not fit what it showed before; kind
    ├── FederationRefusedError    a site or the coordinator refuses to take part; reason
    └── ServerError               the server's fault, or it cannot be reached

Messages never contain batch content.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class TGTinkerError(Exception):
    """Base of every error of TG-Tinker.

    Attributes:
        code: stable name of the error, e.g. ``"INVALID_REQUEST"``; one page each in docs/errors/.
        message: one sentence for a person: what happened and what to do.
        details: the same facts as values, JSON-compatible.
        request_id: what to quote to the operator of the server; ``None`` for errors raised locally.
    """

    code: ClassVar[str] = "TG_TINKER_ERROR"

    def __init__(
        self, message: str, *, details: Mapping[str, Any] | None = None, request_id: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.details: dict[str, Any] = dict(details or {})
        self.request_id = request_id

    def __str__(self) -> str:
        return f"{self.message} [request {self.request_id}]" if self.request_id else self.message


class AuthenticationError(TGTinkerError):
    """No API key, or one the server does not accept."""

    code = "AUTHENTICATION"


class AuthorizationError(TGTinkerError):
    """The key is valid and its roles do not allow this call."""

    code = "AUTHORIZATION"


class RateLimitedError(TGTinkerError):
    """A queue or quota is full. ``retry_after`` is in seconds."""

    code = "RATE_LIMITED"

    def __init__(
        self,
        message: str,
        *,
        retry_after: float = 1.0,
        details: Mapping[str, Any] | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message, details={**(details or {}), "retry_after": retry_after}, request_id=request_id)
        self.retry_after = retry_after


class InvalidRequestError(TGTinkerError):
    """The request cannot be done as it stands.

    Attributes:
        field: the argument that was wrong, e.g. ``"batch.input_ids"`` or ``"max_tokens"``.
        constraint: the rule it broke, e.g. ``"0 <= id < 2048"``.
    """

    code = "INVALID_REQUEST"

    def __init__(
        self,
        message: str,
        *,
        field: str = "",
        constraint: str = "",
        details: Mapping[str, Any] | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(
            message,
            details={**(details or {}), "field": field, "constraint": constraint},
            request_id=request_id,
        )
        self.field = field
        self.constraint = constraint


class DPUnsupportedError(InvalidRequestError):
    """What was asked would make epsilon untrue. ``alternative`` names what to do instead."""

    code = "DP_UNSUPPORTED"

    def __init__(
        self,
        message: str,
        *,
        feature: str = "",
        reason: str = "",
        alternative: str = "",
        field: str = "",
        constraint: str = "",
        details: Mapping[str, Any] | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(
            message,
            field=field or feature,
            constraint=constraint or reason,
            details={**(details or {}), "feature": feature, "reason": reason, "alternative": alternative},
            request_id=request_id,
        )
        self.feature = feature
        self.reason = reason
        self.alternative = alternative


class ResourceNotFoundError(TGTinkerError):
    """No such thing for this tenant. The answer is the same for a missing id and for somebody else's."""

    code = "NOT_FOUND"

    def __init__(
        self,
        message: str,
        *,
        resource_type: str = "",
        resource_id: str = "",
        details: Mapping[str, Any] | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(
            message,
            details={**(details or {}), "resource_type": resource_type, "resource_id": resource_id},
            request_id=request_id,
        )
        self.resource_type = resource_type
        self.resource_id = resource_id


class DPBudgetExceededError(TGTinkerError):
    """The step would bring the dataset over its epsilon; nothing was released.

    Attributes:
        current_epsilon: spent so far by every run on the dataset, at ``delta``; at most ``max_epsilon``.
        max_epsilon: the target.
        delta: the delta both are stated at.
    """

    code = "DP_BUDGET_EXCEEDED"

    def __init__(
        self,
        message: str,
        *,
        current_epsilon: float = 0.0,
        max_epsilon: float = 0.0,
        delta: float = 0.0,
        details: Mapping[str, Any] | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(
            message,
            details={
                **(details or {}),
                "current_epsilon": current_epsilon,
                "max_epsilon": max_epsilon,
                "delta": delta,
            },
            request_id=request_id,
        )
        self.current_epsilon = current_epsilon
        self.max_epsilon = max_epsilon
        self.delta = delta


class FutureTimeoutError(TGTinkerError, TimeoutError):
    """The result did not come within ``timeout`` seconds. The operation goes on; ask again."""

    code = "FUTURE_TIMEOUT"

    def __init__(
        self,
        message: str,
        *,
        future_id: str = "",
        timeout: float | None = None,
        details: Mapping[str, Any] | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(
            message,
            details={**(details or {}), "future_id": future_id, "timeout": timeout},
            request_id=request_id,
        )
        self.future_id = future_id
        self.timeout = timeout


class FutureCancelledError(TGTinkerError):
    """The operation was cancelled and left no effect."""

    code = "FUTURE_CANCELLED"

    def __init__(
        self,
        message: str,
        *,
        future_id: str = "",
        details: Mapping[str, Any] | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message, details={**(details or {}), "future_id": future_id}, request_id=request_id)
        self.future_id = future_id


class LogVerificationError(TGTinkerError):
    """What the server shows of its transparency log is not true, or not what it showed before. Do not go on with it.

    Attributes:
        kind: ``"rolled_back"`` (the log is shorter than it was), ``"forked"`` (its history was rewritten),
            ``"identity_changed"`` (another log answers at this address), ``"bad_signature"`` or ``"bad_proof"``.
    """

    code = "LOG_VERIFICATION"

    def __init__(
        self,
        message: str,
        *,
        kind: str = "",
        details: Mapping[str, Any] | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message, details={**(details or {}), "kind": kind}, request_id=request_id)
        self.kind = kind


class FederationRefusedError(TGTinkerError):
    """A site or the coordinator refuses to take part in a federated job, or in a round of it; nothing was trained.

    Attributes:
        reason: ``"policy"`` (the site's own rules), ``"expired"``, ``"unknown_site"``, ``"bad_signature"``,
            ``"bad_update"`` (wrong names, shapes or values), ``"wrong_round"``, ``"too_few_sites"``, ``"masking"`` (a
            step of secure aggregation that does not fit the others) or ``"hopeless"`` (the privacy asked for leaves
            nothing to learn).
    """

    code = "FEDERATION_REFUSED"

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        details: Mapping[str, Any] | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message, details={**(details or {}), "reason": reason}, request_id=request_id)
        self.reason = reason


class ServerError(TGTinkerError):
    """The server failed, or cannot be reached. Safe to try again."""

    code = "SERVER_ERROR"

"""Operations that another handle submitted, in this process or in another: looked at by their id."""

from __future__ import annotations

import time
from typing import Any

from tg_tinker._transport import Transport
from tg_tinker.errors import ServerError
from tg_tinker.operation import Operation
from tg_tinker.wire.operations import FAILED, FutureState, cancel_future_request


class Elsewhere:
    """Owner of an operation that another handle submitted: it can be watched and cancelled, not sent again."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._lost_since: float | None = None

    def operation(self, state: FutureState) -> Operation:
        """The operation whose state was just learned."""
        operation = Operation(self._transport, self, state.position, state.operation, known=True)
        operation.learn(state)
        return operation

    def saw(self, operation: Operation, state: FutureState) -> None:
        """Nothing to note: the journal is elsewhere."""

    def verify(self, operation: Operation, result: Any) -> None:
        """Left to the handle that made the call: it knows what its request named."""

    def ending(self, operation: Operation, outcome: Any) -> None:
        """Nothing to note: the journal is elsewhere."""

    def lost(self, operation: Operation, state: FutureState) -> None:  # noqa: ARG002 - of the protocol
        """The server was restarted; whoever submitted the call will send it again, so wait for that."""
        now = time.monotonic()
        self._lost_since = self._lost_since or now
        if now - self._lost_since < self._transport.policy.patience_s:
            operation.poll_later()
            return
        text = f"the server was restarted and nobody sent {operation.future_id} again"
        operation.end(FAILED, ServerError(text))

    def cancel(self, operation: Operation) -> bool:
        """Ask the server."""
        cancelled = bool(self._transport.call(cancel_future_request(operation.position)).cancelled)
        if cancelled:
            operation.cancelled()
        return cancelled

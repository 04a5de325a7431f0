"""What is said and what is logged when our own code fails: where and which, never the text."""

from __future__ import annotations

import secrets

import structlog

from tg_tinker.errors import ServerError, TGTinkerError
from tg_tinker_server.service.lanes import Operation

log = structlog.get_logger()


def place_of(error: BaseException) -> str:
    """File and line where an exception was raised. Its text could quote a batch and is not used."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return f"{last.tb_frame.f_code.co_filename}:{last.tb_lineno}" if last else "unknown"


def log_crash(operation: Operation, error: BaseException) -> str:
    """Write type and place of what failed to the log; returns a reference by which an answer can be found there."""
    reference = secrets.token_hex(6)
    # The exception's text can quote a batch, so only its type and place are written.
    log.error(
        "operation_crashed",
        operation=operation.name,
        future_id=operation.future_id,
        error=type(error).__name__,
        at=place_of(error),
        reference=reference,
    )
    return reference


def crash_to_error(operation: Operation, error: Exception) -> TGTinkerError:
    """A defect of ours becomes a ServerError without content; the traceback's place goes to the log."""
    reference = log_crash(operation, error)
    return ServerError(
        f"{operation.name} failed inside the server (reference {reference}); the session goes on",
        details={"reference": reference},
    )

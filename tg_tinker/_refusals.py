"""What a session tells a person when a call cannot be sent, or when it cannot go on at all."""

from __future__ import annotations

from tg_tinker.errors import InvalidRequestError, ServerError, TGTinkerError

_FRESH = "get a fresh handle with service.get_training_client"


def too_large(size_bytes: int, limit_bytes: int) -> InvalidRequestError:
    """One message cannot carry the request."""
    return InvalidRequestError(
        f"the request has {size_bytes} bytes, over the {limit_bytes} of one message; split the batch into several "
        "forward_backward calls, they add up",
        field="batch",
        constraint=f"at most {limit_bytes} bytes",
    )


def closed(run_id: str) -> InvalidRequestError:
    """The handle was closed."""
    return InvalidRequestError(
        f"this handle on {run_id} is closed; {_FRESH}", field="training_client", constraint="open"
    )


def not_sent(refused: str, error: TGTinkerError) -> InvalidRequestError:
    """A call behind one that was refused; sending it would apply what follows from half of the calls."""
    return InvalidRequestError(
        f"not sent, because the {refused} before it was refused: {error.message}",
        field=refused,
        constraint="every call before it was taken",
    )


def went_back(expected_seq: int, durable_seq: int) -> ServerError:
    """The server lost what it had declared safe."""
    return ServerError(
        f"the server went back behind what it had declared durable (it expects call {expected_seq} and had "
        f"confirmed {durable_seq}): was an old database restored?"
    )


def overtaken(expected_seq: int, next_seq: int) -> InvalidRequestError:
    """The server has numbers this handle never gave."""
    return InvalidRequestError(
        f"the server expects call {expected_seq}, this handle stands at {next_seq}",
        field="seq",
        constraint="one handle per run",
    )


def cannot_go_on(run_id: str, error: TGTinkerError) -> TGTinkerError:
    """What every later call gets: the cause, and what to do."""
    if isinstance(error, InvalidRequestError) and error.field == "seq":
        return InvalidRequestError(
            f"another handle drives {run_id}, so this one cannot go on ({error.message}); {_FRESH}",
            field=error.field,
            constraint=error.constraint,
            request_id=error.request_id,
        )
    return ServerError(
        f"this handle on {run_id} cannot go on: {error.message}; {_FRESH} when the cause is mended",
        details=error.details,
        request_id=error.request_id,
    )

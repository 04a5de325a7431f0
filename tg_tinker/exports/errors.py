"""How a damaged or doubtful export is refused."""

from __future__ import annotations

from tg_tinker.errors import InvalidRequestError


def refused(reason: str, *, constraint: str = "as a TG-Tinker server wrote it") -> InvalidRequestError:
    """The error for an export that is not to be used, with what was found."""
    return InvalidRequestError(
        f"this export is refused: {reason}; nothing of it was used, ask its sender for a new one",
        field="export",
        constraint=constraint,
    )

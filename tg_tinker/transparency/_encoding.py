"""Base64 in its one canonical spelling, so that no two texts stand for the same bytes."""

from __future__ import annotations

import base64
import binascii


def to_base64(data: bytes) -> str:
    """Standard alphabet with padding (RFC 4648 §4)."""
    return base64.b64encode(data).decode("ascii")


def from_base64(text: str) -> bytes:
    """Undo ``to_base64``; nothing else is taken, neither line breaks nor stray bits in the last character.

    Raises:
        ValueError: another spelling, or no base64.
    """
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error) as e:
        raise ValueError("not base64") from e
    if to_base64(data) != text:
        raise ValueError("not in the canonical form of base64")
    return data

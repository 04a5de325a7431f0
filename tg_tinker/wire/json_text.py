"""JSON objects as the text in which messages carry them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tg_tinker.errors import InvalidRequestError


def json_to_text(value: Mapping[str, Any], *, field: str) -> str:
    """A JSON object as text.

    Raises:
        InvalidRequestError: naming ``field``: something in it is not JSON.
    """
    if not isinstance(value, Mapping):
        raise InvalidRequestError(
            f"{field} is a {type(value).__name__}; pass a dict", field=field, constraint="JSON object"
        )
    try:
        return json.dumps(dict(value), separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as e:
        raise InvalidRequestError(
            f"{field} holds something that is not JSON: {e}", field=field, constraint="JSON object"
        ) from e


def json_from_text(text: str, *, field: str) -> dict[str, Any]:
    """A JSON object from text; empty text is an empty object."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError) as e:
        raise InvalidRequestError(f"{field} is not JSON", field=field, constraint="JSON object") from e
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{field} is not a JSON object", field=field, constraint="JSON object")
    return value

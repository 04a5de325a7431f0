"""Reading what another party wrote: base64 of a known length, names, tables of both. Anything else is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tg_tinker.errors import FederationRefusedError
from tg_tinker.transparency._encoding import from_base64, to_base64

Facts = dict[str, Any]
"""JSON-compatible facts of an envelope."""

_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)

__all__ = ["Facts", "digest", "raw", "refused", "site_list", "site_table", "text"]


def text(data: bytes) -> str:
    """Bytes as canonical base64."""
    return to_base64(data)


def raw(facts: Mapping[str, Any], name: str, length: int, *, of: str) -> bytes:
    """The bytes under ``name``, exactly ``length`` of them.

    Raises:
        FederationRefusedError: reason "masking".
    """
    value = facts.get(name)
    try:
        data = from_base64(value) if isinstance(value, str) else b""
    except ValueError:
        data = b""
    if len(data) != length:
        raise refused(f"{of}: {name[:80]!r} is not base64 of {length} bytes")
    return data


def digest(facts: Mapping[str, Any], name: str, *, of: str) -> str:
    """The SHA-256 under ``name``, in lower-case hex.

    Raises:
        FederationRefusedError: reason "masking".
    """
    value = facts.get(name)
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise refused(f"{of}: {name!r} is not a digest of 64 hex digits")
    return value


def site_table(facts: Mapping[str, Any], name: str, *, of: str) -> dict[str, Any]:
    """The object under ``name``, whose keys are names of sites."""
    value = facts.get(name)
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise refused(f"{of}: {name!r} is not a table by site")
    return dict(value)


def site_list(facts: Mapping[str, Any], name: str, *, of: str) -> list[str]:
    """The names under ``name``: strings, none twice, sorted."""
    value = facts.get(name)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise refused(f"{of}: {name!r} is not a list of sites")
    if len(set(value)) != len(value):
        raise refused(f"{of}: {name!r} names a site twice")
    return sorted(value)


def refused(message: str) -> FederationRefusedError:
    """A step that does not fit the protocol."""
    return FederationRefusedError(message, reason="masking")

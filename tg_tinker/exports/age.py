"""Sealing for age keys (https://age-encryption.org/v1), through the package ``pyrage``; any age tool opens it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import IO, Any

from tg_tinker.errors import InvalidRequestError
from tg_tinker.exports.errors import refused
from tg_tinker.exports.pieces import PieceReader
from tg_tinker.exports.tar import Bytes

MAGIC = b"age-encryption.org/v1\n"
MOST_RECIPIENTS = 20


def check_recipients(recipients: Sequence[str]) -> list[Any]:
    """pyrage's recipients, at least one.

    Raises:
        InvalidRequestError: none, too many, or a text that is not an age recipient (``age1...``).
    """
    pyrage = _pyrage()
    if not 1 <= len(set(recipients)) <= MOST_RECIPIENTS or len(set(recipients)) != len(recipients):
        raise InvalidRequestError(
            f"name 1 to {MOST_RECIPIENTS} different recipients, got {len(recipients)}",
            field="recipients",
            constraint=f"1 to {MOST_RECIPIENTS} different ones",
        )
    found = []
    for text in recipients:
        try:
            found.append(pyrage.x25519.Recipient.from_str(text))
        except pyrage.RecipientError:
            what = "a private key, which nobody else may see" if text.upper().startswith("AGE-SECRET") else "not one"
            raise InvalidRequestError(
                f"a recipient is the public age key of the receiver, age1...; this is {what}. "
                "The receiver makes one with `age-keygen -o key.txt`",
                field="recipients",
                constraint="age1...",
            ) from None
    return found


def fingerprint(recipient: str) -> str:
    """What the audit log keeps of a recipient, of either kind: SHA-256 of its text, in hex."""
    return "sha256:" + hashlib.sha256(recipient.strip().encode()).hexdigest()


def seal_age(recipients: Sequence[str], source: Iterable[Bytes], sink: IO[bytes]) -> None:
    """Encrypt pieces into ``sink`` for all recipients.

    Raises:
        InvalidRequestError: as `check_recipients`.
    """
    reader, keys = PieceReader(source), check_recipients(recipients)
    try:
        _pyrage().encrypt_io(reader, sink, keys)
    except Exception:
        if reader.error is not None:
            raise reader.error from None
        raise


def open_age(identities: Sequence[str], source: IO[bytes], sink: IO[bytes]) -> None:
    """Decrypt into ``sink``; use nothing of it if this raises.

    Args:
        identities: lines ``AGE-SECRET-KEY-1...``.

    Raises:
        InvalidRequestError: no identity fits, or the file was altered or cut.
    """
    pyrage = _pyrage()
    try:
        keys = [pyrage.x25519.Identity.from_str(i) for i in identities]
    except pyrage.IdentityError:
        raise InvalidRequestError(
            "the identity is not a private age key (AGE-SECRET-KEY-1...)", field="identity", constraint="age"
        ) from None
    try:
        pyrage.decrypt_io(source, sink, keys)
    except (pyrage.DecryptError, OSError) as e:
        raise refused("it was not sealed for this identity, or it was altered or cut") from e


def _pyrage() -> Any:
    try:
        import pyrage  # type: ignore[import-untyped]
    except ModuleNotFoundError as e:
        raise InvalidRequestError(
            "age files need the package pyrage: pip install 'tg-tinker[export]', or use the age tool itself",
            field="recipients",
            constraint="pyrage installed",
        ) from e
    return pyrage

"""Checking a signed document: the order of checks, what each means, and the registry of documents.

A document is a DSSE envelope in canonical JSON. What its payload is follows from the payload's type; each type
registers the function that checks it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import rfc8785

from tg_tinker.errors import InvalidRequestError, LogVerificationError
from tg_tinker.transparency._encoding import from_base64
from tg_tinker.transparency.dsse import open_envelope
from tg_tinker.transparency.folder import Folder
from tg_tinker.transparency.note import VerifierKey
from tg_tinker.transparency.pins import Pins
from tg_tinker.transparency.receipts import Receipts

MAX_BYTES: Final = 64 * 1024 * 1024  # what a server can answer with; reading takes twenty times as much memory


@dataclass(frozen=True, slots=True)
class Verdict:
    """One check that passed: its name, and in words what it showed."""

    check: str
    shows: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """Whom a document may come from, and what this user's own programs noted of the log.

    Attributes:
        keys: verifier keys that were given or pinned.
        pins, receipts: checkpoints seen before, and entries seen appended; ``None``: nothing to compare with.
        beside: documents that this one refers to by digest, to be checked with it where its type has any.
    """

    keys: Sequence[VerifierKey]
    pins: Pins | None = None
    receipts: Receipts | None = None
    beside: Sequence[bytes] = ()

    @classmethod
    def of_user(cls, folder: Folder, key: VerifierKey | None = None) -> Trust:
        """What a data folder holds, and only ``key`` if one is given.

        Raises:
            InvalidRequestError: a file there is damaged; it says which and how to go on.
        """
        pins = Pins(folder)
        pinned = [pin.key for s in pins.servers() if (pin := pins.get(s.origin)) is not None]
        return cls(keys=pinned if key is None else [key], pins=pins, receipts=Receipts(folder))


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """An envelope whose signature holds.

    Attributes:
        value: the payload, parsed; its canonical form is exactly what was signed.
        key: who signed it.
    """

    payload_type: str
    value: Mapping[str, Any]
    key: VerifierKey
    trust: Trust


Check = Callable[[Document], Iterator[Verdict]]


@dataclass(slots=True)
class Registry:
    """Which function checks which type of payload."""

    checks: dict[str, Check] = field(default_factory=dict)

    def register(self, payload_type: str) -> Callable[[Check], Check]:
        """Decorator: the function that checks payloads of that type, raising at the first fault."""

        def add(check: Check) -> Check:
            self.checks[payload_type] = check
            return check

        return add

    def verify(self, data: bytes, trust: Trust) -> Iterator[Verdict]:
        """Check a signed document to the end; each step is yielded once it passed.

        Raises:
            InvalidRequestError: the first check that failed, ``details["check"]``, and why.
        """
        envelope = parse_canonical(data, "the file")
        payload_type = envelope.get("payloadType")
        if not isinstance(payload_type, str) or payload_type not in self.checks:
            known = ", ".join(sorted(self.checks))
            raise refused(
                "format",
                f"it holds {str(payload_type)[:100]!r}, which this version of tg-tinker does not know. A newer one "
                f"may; this one knows {known}",
            )
        key, payload = _opened(envelope, payload_type, trust)
        yield Verdict("signature", f"signed by {key.name} (key {key.key_hash.hex()}), not a bit changed since")
        value = parse_canonical(payload, "what was signed")
        yield from self.checks[payload_type](Document(payload_type=payload_type, value=value, key=key, trust=trust))


REGISTRY: Final = Registry()


def parse_canonical(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object that stands in its one canonical form (RFC 8785), with at most one newline after it.

    Raises:
        InvalidRequestError: anything else; duplicate keys, NaN, another spelling, too long or too deep.
    """
    if len(data) > MAX_BYTES:
        raise refused("json", f"{what} is larger than {MAX_BYTES // 2**20} MiB")
    text = data.removesuffix(b"\n")
    try:
        value = json.loads(text)
        canonical = rfc8785.dumps(value) == text
    except (ValueError, RecursionError) as e:  # rfc8785's own errors are ValueErrors: NaN, huge integers
        raise refused("json", f"{what} is not JSON that can be read: {_short(e)}") from e
    if not isinstance(value, dict):
        raise refused("json", f"{what} is not a JSON object")
    if not canonical:
        raise refused("json", f"{what} is not in canonical form (RFC 8785); it was edited or re-formatted")
    return value


def refused(check: str, message: str) -> InvalidRequestError:
    """The error of a check that failed."""
    return InvalidRequestError(
        f"{check}: {message}",
        field=check,
        constraint="what the entries and the signature say",
        details={"check": check},
    )


def same(name: str, check: str, said: object, right: object) -> None:
    """Require a JSON value to be the one that follows from the rest of its document.

    Raises:
        InvalidRequestError: the first place where it is not.
    """
    different = _difference(name, said, right)
    if different:
        raise refused(check, different)


def _difference(path: str, said: object, right: object) -> str:
    """The first place where two JSON values differ, in words; empty where they do not."""
    if isinstance(said, dict) and isinstance(right, dict):
        odd = sorted(set(said) ^ set(right))
        if odd:
            return f"{path} has too many or too few fields: {', '.join(odd)[:200]}"
        return next((d for k in right if (d := _difference(f"{path}.{k}", said[k], right[k]))), "")
    if isinstance(said, list) and isinstance(right, list):
        if len(said) != len(right):
            return f"{path} has {len(said)} items, and {len(right)} follow from the entries"
        pairs = enumerate(zip(said, right, strict=True))
        return next((d for i, (a, b) in pairs if (d := _difference(f"{path}[{i}]", a, b))), "")
    if type(said) is type(right) and said == right:
        return ""
    return f"{path} is {str(said)[:200]!r} in the report, and {str(right)[:200]!r} follows from its entries"


def _short(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]


def _opened(envelope: Mapping[str, Any], payload_type: str, trust: Trust) -> tuple[VerifierKey, bytes]:
    """Who signed, and what. The key id only chooses among keys that are trusted already."""
    try:
        (signature,) = envelope["signatures"]
        keyid = str(signature["keyid"])
    except (KeyError, ValueError, TypeError) as e:
        raise refused("signature", "it is not signed, or by more than one") from e
    fault = LogVerificationError("its signer is not known here")
    for key in trust.keys:
        if key.key_hash.hex() == keyid:
            try:
                return key, open_envelope(envelope, key, payload_type=payload_type)
            except LogVerificationError as e:
                fault = e
    if fault.kind:
        raise refused("signature", fault.message) from fault
    known = ", ".join(k.key_hash.hex() for k in trust.keys) or "none"
    raise refused(
        "signer",
        f"its signer, key {keyid[:20]}{_claimed(envelope)}, is not known here; known keys: {known}. Ask whoever "
        "answers for the server for its verifier key, over another way than the file came, and give it with --key",
    )


def _claimed(envelope: Mapping[str, Any]) -> str:
    """The key that an unverified payload names, so that a person can compare it."""
    try:
        integrity = json.loads(from_base64(envelope["payload"]))["integrity"]
        return f" ({VerifierKey.parse(integrity['verifier_key']).text})"
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError, LogVerificationError):
        return ""

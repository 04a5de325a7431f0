"""Entries of ledgers and audit logs, their canonical bytes, and checking a chain offline.

An entry is a JSON object in canonical form (RFC 8785) that names the hash of the entry before it; its own hash
is SHA-256 over a domain tag and those bytes. Changing, removing or reordering entries breaks the chain.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC
from typing import Any

import rfc8785

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types.info import AuditLogEntry

LEDGER_DOMAIN = b"tg-tinker/ledger/v1\x00"
AUDIT_DOMAIN = b"tg-tinker/audit/v1\x00"
START = bytes(32)  # what the first entry names as the hash before it


@dataclass(frozen=True, slots=True)
class ChainEntry:
    """One entry of a chain. ``body`` holds its position from 0 and ``prev_hash`` in hex among its fields."""

    body: Mapping[str, Any]
    entry_hash: bytes

    @classmethod
    def make(cls, domain: bytes, body: Mapping[str, Any], *, position: int, prev_hash: bytes) -> ChainEntry:
        """An entry that follows ``prev_hash`` at ``position``."""
        whole = {**body, "position": position, "prev_hash": prev_hash.hex()}
        return cls(whole, entry_hash(domain, whole))

    @classmethod
    def from_json(cls, text: str) -> ChainEntry:
        """Read an entry from its line.

        Raises:
            InvalidRequestError: it is not one.
        """
        try:
            value = json.loads(text)
            return cls(dict(value["body"]), bytes.fromhex(value["entry_hash"]))
        except (ValueError, KeyError, TypeError) as e:
            raise InvalidRequestError(
                "this line is not a ledger entry", field="entries", constraint='{"body": ..., "entry_hash": ...}'
            ) from e

    def to_json(self) -> str:
        """The entry as one canonical line."""
        return rfc8785.dumps({"body": dict(self.body), "entry_hash": self.entry_hash.hex()}).decode()

    def body_json(self) -> str:
        """The body alone, canonical: what is hashed."""
        return rfc8785.dumps(dict(self.body)).decode()

    @property
    def position(self) -> int:
        """Place in the chain, from 0."""
        return int(self.body["position"])

    @property
    def prev_hash(self) -> bytes:
        """Hash of the entry before."""
        return bytes.fromhex(self.body["prev_hash"])

    @property
    def kind(self) -> str:
        """Ledger entries: register, open, charge, settle, raise, erase or report. Audit entries have none."""
        return str(self.body.get("kind", ""))


LedgerEntry = ChainEntry


def entry_hash(domain: bytes, body: Mapping[str, Any]) -> bytes:
    """SHA-256 over the domain tag and the canonical bytes."""
    return hashlib.sha256(domain + rfc8785.dumps(dict(body))).digest()


def verify_chain(entries: Sequence[ChainEntry], *, domain: bytes = LEDGER_DOMAIN, head: bytes | None = None) -> bytes:
    """Check every link from the first entry on; returns the hash of the last one.

    A chain that was cut at its end is a valid shorter chain: only a ``head`` that was noted earlier tells. With
    ``head`` given, an entry of that hash must be there.

    Raises:
        InvalidRequestError: naming the first position that does not fit.
    """
    before = START
    seen = head is None or head == START
    for position, entry in enumerate(entries):
        reason = _fault(entry, position, before, domain)
        if reason:
            raise _broken(position, reason)
        before = entry.entry_hash
        seen = seen or before == head
    if not seen:
        raise _broken(
            len(entries), "the entry that was noted as its head is missing; the end was cut off or rewritten"
        )
    return before


def verify_audit_chain(records: Sequence[ChainEntry | AuditLogEntry], *, gapless: bool = False) -> bytes:
    """Check records of one tenant's audit log, oldest first; returns the hash of the last one.

    A query need not return the whole log. Every record must be intact, and wherever it stands right after the
    record before it, or first in the log, it must name that one's hash. Set ``gapless`` for a query without filters:
    then no record may be missing between two others.

    Raises:
        InvalidRequestError: naming the first position that does not fit.
    """
    before: ChainEntry | None = None
    for index, record in enumerate(records):
        entry = record if isinstance(record, ChainEntry) else _record(record)
        position = entry.body.get("position")
        if not isinstance(position, int) or position < 0 or (before is not None and position <= before.position):
            raise _broken(index, f"a record says it stands at {position!r}, out of order")
        linked = START if position == 0 else None
        if before is not None and position == before.position + 1:
            linked = before.entry_hash
        elif before is not None and gapless:
            raise _broken(before.position + 1, "this record is missing")
        reason = _fault(entry, position, linked, AUDIT_DOMAIN)
        if reason:
            raise _broken(position, reason)
        before = entry
    return before.entry_hash if before is not None else START


def audit_body(record: AuditLogEntry) -> dict[str, Any]:
    """What is hashed of an audit record, without its place in the chain. Times are UTC."""
    more: dict[str, Any] = {"actor": record.actor} if record.actor else {}
    if record.facts:
        more["facts"] = dict(record.facts)
    return {
        **more,
        "operation": record.operation,
        "training_client_id": record.training_client_id,
        "request_hash": record.request_hash,
        "request_bytes": record.request_bytes,
        "artifact_ids": list(record.artifact_ids),
        "started": record.started.astimezone(UTC).isoformat(),
        "completed": record.completed.astimezone(UTC).isoformat(),
        "success": record.success,
        "error_code": record.error_code,
        "dp_metrics": None if record.dp_metrics is None else dict(record.dp_metrics),
    }


def _record(record: AuditLogEntry) -> ChainEntry:
    body = {**audit_body(record), "position": record.entry_id, "prev_hash": record.prev_hash}
    return ChainEntry(body, bytes.fromhex(record.record_hash))


def _fault(entry: ChainEntry, position: int, before: bytes | None, domain: bytes) -> str:
    """What is wrong with an entry; ``before`` is ``None`` where the entry before it is not at hand."""
    if entry.body.get("position") != position:
        return f"an entry says it stands at {entry.body.get('position')}; one is missing, added or moved"
    if before is not None and entry.body.get("prev_hash") != before.hex():
        return "it does not follow the entry before it"
    try:
        intact = entry_hash(domain, entry.body) == entry.entry_hash
    except (ValueError, TypeError, RecursionError):  # NaN and the like: nothing that was ever hashed
        return "it is not canonical JSON"
    return "" if intact else "its content was changed"


def _broken(position: int, reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"the chain is broken at position {position}: {reason}",
        field="entries",
        constraint="every entry names the one before it",
        details={"position": position},
    )

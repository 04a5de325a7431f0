"""What an auditor needs: ledger and audit entries, their canonical bytes, and checking a chain offline.

An entry is a JSON object in canonical form (RFC 8785) that names the hash of the entry before it; its own hash
is SHA-256 over a domain tag and those bytes. Changing, removing or reordering entries breaks the chain.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import rfc8785

from tg_tinker.errors import InvalidRequestError

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
        """Ledger entries: open, charge or settle. Audit entries have none."""
        return str(self.body.get("kind", ""))


LedgerEntry = ChainEntry


def entry_hash(domain: bytes, body: Mapping[str, Any]) -> bytes:
    """SHA-256 over the domain tag and the canonical bytes."""
    return hashlib.sha256(domain + rfc8785.dumps(dict(body))).digest()


def verify_chain(entries: Sequence[ChainEntry], *, domain: bytes = LEDGER_DOMAIN) -> bytes:
    """Check every link from the first entry on; returns the hash of the last one.

    Raises:
        InvalidRequestError: naming the first position that does not fit.
    """
    before = START
    for position, entry in enumerate(entries):
        reason = _fault(entry, position, before, domain)
        if reason:
            raise InvalidRequestError(
                f"the chain is broken at position {position}: {reason}",
                field="entries",
                constraint="every entry names the one before it",
                details={"position": position},
            )
        before = entry.entry_hash
    return before


def verify_audit_chain(entries: Sequence[ChainEntry]) -> bytes:
    """The same for a tenant's audit log, which must be whole from its first entry."""
    return verify_chain(entries, domain=AUDIT_DOMAIN)


def _fault(entry: ChainEntry, position: int, before: bytes, domain: bytes) -> str:
    if entry.body.get("position") != position:
        return f"an entry says it stands at {entry.body.get('position')}; one is missing, added or moved"
    if entry.body.get("prev_hash") != before.hex():
        return "it does not follow the entry before it"
    if entry_hash(domain, entry.body) != entry.entry_hash:
        return "its content was changed"
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyLedger:
    """The whole ledger of one dataset as the server gave it, and what it adds up to.

    Attributes:
        epsilon_spent: of every charge, settled or not, at ``delta``.
        target_epsilon: the budget; inf when there is none.
    """

    dataset_id: str
    entries: tuple[LedgerEntry, ...]
    epsilon_spent: float
    target_epsilon: float
    delta: float

    @classmethod
    def from_lines(
        cls, dataset_id: str, lines: Iterable[str], *, epsilon_spent: float, target_epsilon: float, delta: float
    ) -> PrivacyLedger:
        """Read the entries from their lines, unverified."""
        return cls(
            dataset_id=dataset_id,
            entries=tuple(ChainEntry.from_json(line) for line in lines),
            epsilon_spent=epsilon_spent,
            target_epsilon=target_epsilon,
            delta=delta,
        )

    @property
    def head(self) -> bytes:
        """Hash of the last entry."""
        return self.entries[-1].entry_hash if self.entries else START

    @property
    def charges(self) -> tuple[LedgerEntry, ...]:
        """Every release that was paid for."""
        return tuple(e for e in self.entries if e.kind == "charge")

    def verify(self) -> None:
        """Check the chain, that every entry is of this dataset, and that every release was charged before it.

        Raises:
            InvalidRequestError: naming the first position that does not fit.
        """
        verify_chain(self.entries)
        charged: set[int] = set()
        for entry in self.entries:
            reason = ""
            if entry.body.get("dataset_id") != self.dataset_id:
                reason = f"it belongs to dataset {entry.body.get('dataset_id')!r}"
            elif entry.kind == "charge":
                charged.add(entry.position)
            elif entry.kind == "settle":
                paid = entry.body.get("charge_position")
                if paid not in charged:
                    reason = "it settles what was not charged before it, or was settled already"
                else:
                    charged.discard(paid)
            elif entry.kind != "open":
                reason = f"it is of unknown kind {entry.kind!r}"
            if reason:
                raise InvalidRequestError(
                    f"the ledger is wrong at position {entry.position}: {reason}",
                    field="entries",
                    constraint="charge before settle",
                    details={"position": entry.position},
                )

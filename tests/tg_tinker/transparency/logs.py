"""A log in memory, as a server keeps it, honest or not."""

from __future__ import annotations

from collections.abc import Sequence

import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tg_tinker.transparency.merkle import (
    Node,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    node_hash,
    root_from,
)
from tg_tinker.transparency.note import Checkpoint, VerifierKey, sign_note
from tg_tinker.transparency.receipts import Receipt


class Log:
    """Entries, a key, and whatever it is told to sign."""

    def __init__(self, entries: Sequence[str] = (), *, seed: int = 1) -> None:
        self.private = Ed25519PrivateKey.from_private_bytes(bytes([seed] * 32))
        self.key = VerifierKey.of(self.private.public_key().public_bytes_raw())
        self.entries: list[str] = []
        self.nodes: dict[Node, bytes] = {}
        for entry in entries:
            self.append(entry)

    @property
    def size(self) -> int:
        return len(self.entries)

    def append(self, entry: str) -> None:
        level, index = 0, self.size
        self.entries.append(entry)
        self.nodes[0, index] = leaf_hash(entry.encode())
        while index & 1:
            joined = node_hash(self.nodes[level, index - 1], self.nodes[level, index])
            level, index = level + 1, index >> 1
            self.nodes[level, index] = joined

    def note(self, size: int | None = None) -> str:
        size = self.size if size is None else size
        return sign_note(
            Checkpoint(self.key.name, size, root_from(size, self.nodes)).body(), self.key, self.private.sign
        )

    def proof(self, from_size: int) -> list[bytes]:
        """As a server answers: nothing to prove to somebody who has seen more than there is."""
        return consistency_proof(from_size, self.size, self.nodes) if from_size <= self.size else []

    def answer(self, from_size: int) -> tuple[str, str, int, list[bytes]]:
        """The arguments of ``Watch.advance``."""
        return self.note(), self.key.text, from_size, self.proof(from_size)

    def receipt(self, index: int) -> Receipt:
        return Receipt(
            entry=self.entries[index],
            leaf_index=index,
            checkpoint=self.note(),
            proof=tuple(inclusion_proof(index, self.size, self.nodes)),
            verifier_key=self.key.text,
        )


def entry(number: int, dataset_id: str = "data-1") -> str:
    """A body of a ledger entry."""
    return rfc8785.dumps({"kind": "charge", "dataset_id": dataset_id, "position": number, "prev_hash": "00"}).decode()


def log_of(count: int, *, seed: int = 1) -> Log:
    """A log of so many entries."""
    return Log([entry(i) for i in range(count)], seed=seed)

"""The transparency log: one Merkle tree per tenant over every entry of its ledgers and its audit log (RFC 6962).

An entry is appended in the transaction that writes it. Whoever holds a signed checkpoint can be shown that an entry
is in the tree, and that a later tree only added to it; a database that was restored or rewritten cannot show that.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker.transparency import merkle
from tg_tinker.transparency.note import Checkpoint
from tg_tinker_server.crypto.signing import TenantSigner
from tg_tinker_server.store import log_rows as rows
from tg_tinker_server.store.database import Database, Transaction

MAX_LEAVES = 1000  # of one answer


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedCheckpoint:
    """A checkpoint, and the key that its reader must know from elsewhere."""

    size: int
    note: str
    verifier_key: str


def append(tx: Transaction, tenant: str, body: str) -> int:
    """Add an entry's canonical body as the next leaf; returns its index. Part of the caller's transaction."""
    index = rows.size(tx, tenant)
    value = merkle.leaf_hash(body.encode())
    level, at = 0, index
    added = {(0, index): value}
    while at % 2:
        left = rows.node(tx, tenant, (level, at - 1))
        if left is None:
            raise ServerError(
                f"the transparency log lost a node (level {level}, {at - 1}); restore the database",
                details={"component": "log"},
            )
        value = merkle.node_hash(left, value)
        level, at = level + 1, at // 2
        added[level, at] = value
    rows.insert_nodes(tx, tenant, added)
    return index


@dataclass(frozen=True, slots=True)
class TransparencyLog:
    """Signs checkpoints of tenants' trees and proves what is in them."""

    db: Database
    signers: TenantSigner

    def checkpoint(self, tx: Transaction, tenant: str, size: int | None = None) -> SignedCheckpoint:
        """The tree at ``size`` leaves, by default now, signed.

        Raises:
            InvalidRequestError: the tree never had that size.
        """
        at = self._within(tx, tenant, size)
        root = merkle.root_from(at, rows.nodes(tx, tenant, merkle.root_nodes(at)))
        signer = self.signers.signer(tenant)
        body = Checkpoint(origin=signer.origin, size=at, root=root).body()
        return SignedCheckpoint(size=at, note=signer.sign_note(body), verifier_key=signer.verifier_key)

    def inclusion(self, tx: Transaction, tenant: str, index: int, size: int) -> list[bytes]:
        """That the leaf at ``index`` is in the tree of ``size`` leaves: its audit path (RFC 6962, 2.1.1)."""
        self._within(tx, tenant, size)
        wanted = merkle.inclusion_nodes(index, size)
        return list(merkle.inclusion_proof(index, size, rows.nodes(tx, tenant, wanted)))

    def consistency(self, tx: Transaction, tenant: str, old: int, new: int) -> list[bytes]:
        """That the tree of ``new`` leaves begins with the tree of ``old`` (RFC 6962, 2.1.2).

        Raises:
            InvalidRequestError: ``old`` is larger than ``new``, or the tree was never so large. Whoever saw a larger
                one has seen another history.
        """
        self._within(tx, tenant, new)
        if not 0 <= old <= new:
            raise _no_such_size(old, new)
        if old in (0, new):
            return []
        wanted = merkle.consistency_nodes(old, new)
        return list(merkle.consistency_proof(old, new, rows.nodes(tx, tenant, wanted)))

    def subset(self, tx: Transaction, tenant: str, indexes: Collection[int], size: int) -> list[bytes]:
        """That all of these leaves are in the tree of ``size`` leaves, in one proof."""
        self._within(tx, tenant, size)
        wanted = merkle.subset_nodes(indexes, size)
        return list(merkle.subset_proof(indexes, size, rows.nodes(tx, tenant, wanted)))

    def leaves(self, tx: Transaction, tenant: str, start: int, count: int) -> Sequence[str]:
        """Canonical bodies of up to ``MAX_LEAVES`` consecutive entries, for whoever checks the whole log."""
        start = min(max(0, start), rows.size(tx, tenant))
        return rows.leaves(tx, tenant, start, min(max(0, count), MAX_LEAVES))

    @staticmethod
    def _within(tx: Transaction, tenant: str, size: int | None) -> int:
        there = rows.size(tx, tenant)
        if size is None:
            return there
        if not 0 <= size <= there:
            raise _no_such_size(size, there)
        return size


def _no_such_size(asked: int, there: int) -> InvalidRequestError:
    return InvalidRequestError(
        f"the log has {there} entries, not {asked}; if you saw {asked}, this server goes on from an older database: "
        "restore the newest one",
        field="size",
        constraint=f"0 to {there}",
    )

"""What the server says about its transparency log; unverified until the client has checked it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LogState:
    """A tenant's log at one moment.

    Attributes:
        checkpoint: C2SP signed note with origin, size and root.
        verifier_key: C2SP verifier key of its signature.
        known_size: the size that ``consistency`` starts from.
        consistency: proof that this tree begins with the tree of ``known_size`` leaves; empty where it is smaller.
    """

    checkpoint: str
    verifier_key: str
    known_size: int = 0
    consistency: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LogReceipt:
    """Proof that an entry is in the log.

    Attributes:
        entry_json: the entry's body in RFC 8785 form; the leaf.
        leaf_index: its place in the tree, from 0.
        inclusion: its audit path in the tree of ``log``.
    """

    entry_json: str
    leaf_index: int
    inclusion: tuple[bytes, ...]
    log: LogState

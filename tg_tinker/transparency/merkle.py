"""The Merkle tree of RFC 6962: checking proofs, and making them from stored hashes.

A leaf hashes to SHA-256(0x00 | data), two subtrees to SHA-256(0x01 | left | right); a tree of n > 1 leaves splits
after the largest power of two below n (RFC 6962 §2.1). ``verify_*`` and ``root_of`` are what a client needs.
The rest makes proofs: ``*_nodes`` says which hashes of complete subtrees are needed, so that a store can fetch all
of them at once, and ``root_from`` and ``*_proof`` join them. Node (l, i) is the subtree over leaves i * 2**l to
(i + 1) * 2**l - 1; once complete its hash never changes. The two halves share the hash functions and no more.

A proof does not prove the size: trees of 13 and 14 leaves can give leaf 0 the same path. The size is true because the
log signed it together with the root, and consistency proofs hold it to both.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

from tg_tinker.errors import InvalidRequestError, LogVerificationError

HASH_BYTES = 32
EMPTY_ROOT = hashlib.sha256(b"").digest()
MAX_SIZE = 2**63 - 1

Node = tuple[int, int]
_Range = tuple[int, int]  # leaves from the first up to, without, the second: always a subtree of RFC 6962's recursion


def leaf_hash(data: bytes) -> bytes:
    """The hash of one leaf, 32 bytes."""
    return hashlib.sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The hash of two subtrees, 32 bytes."""
    return hashlib.sha256(b"\x01" + left + right).digest()


def root_of(leaf_hashes: Iterable[bytes]) -> bytes:
    """The root over all leaves, from their hashes. Memory for log2(n) hashes."""
    complete: list[tuple[int, bytes]] = []  # (level, hash), levels falling: the subtrees that are full so far
    for hashed in leaf_hashes:
        level = 0
        while complete and complete[-1][0] == level:
            hashed = node_hash(complete.pop()[1], hashed)  # noqa: PLW2901 - it climbs
            level += 1
        complete.append((level, hashed))
    return _join([h for _, h in complete])


# Checking. The algorithms are those of RFC 9162 §2.1.3.2 and §2.1.4.2, which hold for the trees of RFC 6962.


def verify_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> None:
    """Check that ``leaf`` (a leaf's hash) stands at ``index`` of the tree of ``size`` leaves under ``root``.

    Raises:
        LogVerificationError: it does not follow from the proof; kind ``"bad_proof"``.
    """
    _check_sizes(0 <= index < size <= MAX_SIZE, f"leaf {index} of a log of {size}")
    _check_hashes([leaf, root, *proof])
    fn, sn, hashed = index, size - 1, leaf
    for sibling in proof:
        if sn == 0:
            raise _bad_proof(f"the inclusion proof of leaf {index} is too long for a log of {size}")
        if fn & 1 or fn == sn:
            hashed = node_hash(sibling, hashed)
            while fn and not fn & 1:
                fn, sn = fn >> 1, sn >> 1
        else:
            hashed = node_hash(hashed, sibling)
        fn, sn = fn >> 1, sn >> 1
    if sn != 0:
        raise _bad_proof(f"the inclusion proof of leaf {index} is too short for a log of {size}")
    if hashed != root:
        raise _bad_proof(f"entry {index} is not in the log of {size} that was signed")


def verify_consistency(
    old_size: int, new_size: int, old_root: bytes, new_root: bytes, proof: Sequence[bytes]
) -> None:
    """Check that the first ``old_size`` leaves under ``new_root`` are those under ``old_root``.

    Raises:
        LogVerificationError: it does not follow from the proof; kind ``"bad_proof"``.
    """
    _check_sizes(0 <= old_size <= new_size <= MAX_SIZE, f"a log of {new_size} that grew from {old_size}")
    _check_hashes([old_root, new_root, *proof])
    wrong = _bad_proof(f"the log of {new_size} does not continue the log of {old_size}")
    if old_size in (0, new_size):
        expected = EMPTY_ROOT if old_size == 0 else new_root
        if proof or old_root != expected or (new_size == 0 and new_root != EMPTY_ROOT):
            raise wrong
        return
    # A complete old tree is a node of the new one, whose hash the client has: the proof leaves it out.
    path = [old_root, *proof] if old_size & (old_size - 1) == 0 else list(proof)
    if not path:
        raise wrong
    fn, sn = old_size - 1, new_size - 1
    while fn & 1:
        fn, sn = fn >> 1, sn >> 1
    old = new = path[0]
    for sibling in path[1:]:
        if sn == 0:
            raise wrong
        if fn & 1 or fn == sn:
            old, new = node_hash(sibling, old), node_hash(sibling, new)
            while fn and not fn & 1:
                fn, sn = fn >> 1, sn >> 1
        else:
            new = node_hash(new, sibling)
        fn, sn = fn >> 1, sn >> 1
    if sn != 0 or old != old_root or new != new_root:
        raise wrong


def verify_subset(leaves: Mapping[int, bytes], size: int, proof: Sequence[bytes], root: bytes) -> None:
    """Check that every leaf hash of ``leaves`` stands at its index of the tree of ``size`` leaves under ``root``.

    The proof holds one hash for each largest subtree without a wanted leaf, from left to right.

    Raises:
        LogVerificationError: it does not follow from the proof; kind ``"bad_proof"``.
    """
    wanted = sorted(leaves)
    _check_sizes(0 <= size <= MAX_SIZE, f"a log of {size}")
    _check_sizes(
        not wanted or (wanted[0] >= 0 and wanted[-1] < size), f"leaves up to {wanted[-1:]} of a log of {size}"
    )
    _check_hashes([root, *proof, *leaves.values()])
    rest = iter(proof)

    def walk(begin: int, end: int) -> bytes:
        first = bisect_left(wanted, begin)
        if first == len(wanted) or wanted[first] >= end:
            return next(rest)
        if end - begin == 1:
            return leaves[begin]
        middle = begin + (1 << (end - begin - 1).bit_length() - 1)
        left = walk(begin, middle)
        return node_hash(left, walk(middle, end))

    try:
        found = walk(0, size) if size else EMPTY_ROOT
    except StopIteration:
        raise _bad_proof(f"the proof of {len(wanted)} entries of a log of {size} is too short") from None
    if next(rest, None) is not None:
        raise _bad_proof(f"the proof of {len(wanted)} entries of a log of {size} is too long")
    if found != root:
        raise _bad_proof(f"not all of these {len(wanted)} entries are in the log of {size} that was signed")


# Making proofs, straight from the recursion of RFC 6962 §2.1.1 and §2.1.2.


def root_nodes(size: int) -> list[Node]:
    """The nodes that ``root_from`` needs, left to right."""
    _require(0 <= size <= MAX_SIZE, "size")
    return _nodes((0, size))


def root_from(size: int, nodes: Mapping[Node, bytes]) -> bytes:
    """The root of the first ``size`` leaves."""
    return _join([_fetched(nodes, n) for n in root_nodes(size)])


def inclusion_nodes(index: int, size: int) -> list[Node]:
    """The nodes that ``inclusion_proof`` needs."""
    return [n for part in _inclusion(index, size) for n in _nodes(part)]


def inclusion_proof(index: int, size: int, nodes: Mapping[Node, bytes]) -> list[bytes]:
    """The audit path of leaf ``index`` in the tree of ``size`` leaves, from the leaf up."""
    return [_hash(part, nodes) for part in _inclusion(index, size)]


def consistency_nodes(old_size: int, new_size: int) -> list[Node]:
    """The nodes that ``consistency_proof`` needs."""
    return [n for part in _consistency(old_size, new_size) for n in _nodes(part)]


def consistency_proof(old_size: int, new_size: int, nodes: Mapping[Node, bytes]) -> list[bytes]:
    """The proof that the tree of ``new_size`` continues that of ``old_size``; empty for 0 and for equal sizes."""
    return [_hash(part, nodes) for part in _consistency(old_size, new_size)]


def subset_nodes(indexes: Iterable[int], size: int) -> list[Node]:
    """The nodes that ``subset_proof`` needs."""
    return [n for part in _subset(indexes, size) for n in _nodes(part)]


def subset_proof(indexes: Iterable[int], size: int, nodes: Mapping[Node, bytes]) -> list[bytes]:
    """What ``verify_subset`` needs beside the leaves at ``indexes``, left to right."""
    return [_hash(part, nodes) for part in _subset(indexes, size)]


def _inclusion(index: int, size: int) -> list[_Range]:
    _require(0 <= index < size <= MAX_SIZE, "index")
    siblings, begin, end = [], 0, size
    while end - begin > 1:
        middle = begin + _split(end - begin)
        if index < middle:
            siblings.append((middle, end))
            end = middle
        else:
            siblings.append((begin, middle))
            begin = middle
    return siblings[::-1]


def _consistency(old_size: int, new_size: int) -> list[_Range]:
    _require(0 <= old_size <= new_size <= MAX_SIZE, "old_size")
    if old_size in (0, new_size):
        return []
    parts, begin, end = [], 0, new_size
    while end != old_size:
        middle = begin + _split(end - begin)
        if old_size <= middle:
            parts.append((middle, end))
            end = middle
        else:
            parts.append((begin, middle))
            begin = middle
    if begin:  # otherwise it is the old tree itself, whose root the client has
        parts.append((begin, end))
    return parts[::-1]


def _subset(indexes: Iterable[int], size: int) -> list[_Range]:
    wanted = sorted(set(indexes))
    _require(0 <= size <= MAX_SIZE, "size")
    _require(not wanted or (wanted[0] >= 0 and wanted[-1] < size), "indexes")
    parts: list[_Range] = []
    waiting: list[_Range] = [(0, size)] if size else []
    while waiting:
        begin, end = waiting.pop()
        first = bisect_left(wanted, begin)
        if first == len(wanted) or wanted[first] >= end:
            parts.append((begin, end))
        elif end - begin > 1:
            middle = begin + _split(end - begin)
            waiting += [(middle, end), (begin, middle)]
    return parts


def _split(count: int) -> int:
    """The largest power of two below ``count``."""
    power = 1
    while power * 2 < count:
        power *= 2
    return power


def _nodes(part: _Range) -> list[Node]:
    """The complete subtrees that make up a range, left to right."""
    begin, end = part
    nodes: list[Node] = []
    while begin < end:
        level = (end - begin).bit_length() - 1  # begin is a multiple of every power of two that fits: see _Range
        nodes.append((level, begin >> level))
        begin += 1 << level
    return nodes


def _hash(part: _Range, nodes: Mapping[Node, bytes]) -> bytes:
    return _join([_fetched(nodes, n) for n in _nodes(part)])


def _join(complete: Sequence[bytes]) -> bytes:
    """The hash over complete subtrees of falling size, left to right."""
    if not complete:
        return EMPTY_ROOT
    hashed = complete[-1]
    for left in reversed(complete[:-1]):
        hashed = node_hash(left, hashed)
    return hashed


def _fetched(nodes: Mapping[Node, bytes], node: Node) -> bytes:
    try:
        return nodes[node]
    except KeyError:
        level, index = node
        raise _bad_proof(f"the log is damaged: the hash of node {index} of level {level} is missing") from None


def _check_sizes(possible: bool, what: str) -> None:
    if not possible:
        raise _bad_proof(f"there is no such thing as {what}")


def _check_hashes(hashes: Iterable[bytes]) -> None:
    if any(len(h) != HASH_BYTES for h in hashes):
        raise _bad_proof(f"a hash in a proof is not of {HASH_BYTES} bytes")


def _require(holds: bool, field: str) -> None:
    if not holds:
        raise InvalidRequestError(
            f"{field} is outside the log", field=field, constraint="0 <= index < size; 0 <= old_size <= new_size"
        )


def _bad_proof(message: str) -> LogVerificationError:
    return LogVerificationError(message, kind="bad_proof")

"""Proofs, made one way and checked another, against RFC 6962's definition written out once more."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tg_tinker.errors import InvalidRequestError, LogVerificationError
from tg_tinker.transparency.merkle import (
    EMPTY_ROOT,
    Node,
    consistency_nodes,
    consistency_proof,
    inclusion_nodes,
    inclusion_proof,
    leaf_hash,
    root_from,
    root_nodes,
    root_of,
    subset_nodes,
    subset_proof,
    verify_consistency,
    verify_inclusion,
    verify_subset,
)

MOST = 40
DATA = [f"entry {i}".encode() for i in range(MOST)]
LEAVES = [leaf_hash(d) for d in DATA]


def k_of(n: int) -> int:
    return max(2**i for i in range(n) if 2**i < n)


def mth(d: list[bytes]) -> bytes:
    """MTH(D[n]) of RFC 6962 §2.1, word for word."""
    if not d:
        return hashlib.sha256(b"").digest()
    if len(d) == 1:
        return hashlib.sha256(b"\x00" + d[0]).digest()
    k = k_of(len(d))
    return hashlib.sha256(b"\x01" + mth(d[:k]) + mth(d[k:])).digest()


def path(m: int, d: list[bytes]) -> list[bytes]:
    """PATH(m, D[n]) of RFC 6962 §2.1.1."""
    if len(d) == 1:
        return []
    k = k_of(len(d))
    return [*path(m, d[:k]), mth(d[k:])] if m < k else [*path(m - k, d[k:]), mth(d[:k])]


def subproof(m: int, d: list[bytes], whole: bool) -> list[bytes]:
    """SUBPROOF(m, D[n], b) of RFC 6962 §2.1.2."""
    if m == len(d):
        return [] if whole else [mth(d)]
    k = k_of(len(d))
    if m <= k:
        return [*subproof(m, d[:k], whole), mth(d[k:])]
    return [*subproof(m - k, d[k:], False), mth(d[:k])]


def without(wanted: set[int], d: list[bytes], begin: int = 0) -> list[bytes]:
    """The subset proof as docs/formats/log.md defines it."""
    if not any(begin <= i < begin + len(d) for i in wanted):
        return [mth(d)]
    if len(d) == 1:
        return []
    k = k_of(len(d))
    return [*without(wanted, d[:k], begin), *without(wanted, d[k:], begin + k)]


NODES: dict[Node, bytes] = {
    (level, i): mth(DATA[i << level : (i + 1) << level]) for level in range(6) for i in range(MOST >> level)
}


def only(nodes: list[Node]) -> dict[Node, bytes]:
    """What a store would answer when asked for these, and nothing else."""
    assert len(set(nodes)) == len(nodes)
    return {n: NODES[n] for n in nodes}


def refused(kind: str = "bad_proof") -> pytest.RaisesExc[LogVerificationError]:
    return pytest.RaisesExc(LogVerificationError, check=lambda e: e.kind == kind == e.details["kind"])


@pytest.mark.parametrize("size", range(MOST + 1))
def test_the_root_is_that_of_the_rfc(size: int) -> None:
    assert root_of(LEAVES[:size]) == mth(DATA[:size]) == root_from(size, only(root_nodes(size)))


@pytest.mark.parametrize("size", range(1, MOST + 1))
def test_inclusion_proofs_are_those_of_the_rfc_and_hold(size: int) -> None:
    for index in range(size):
        proof = inclusion_proof(index, size, only(inclusion_nodes(index, size)))
        assert proof == path(index, DATA[:size])
        verify_inclusion(LEAVES[index], index, size, proof, mth(DATA[:size]))


@pytest.mark.parametrize("new", range(MOST + 1))
def test_consistency_proofs_are_those_of_the_rfc_and_hold(new: int) -> None:
    for old in range(new + 1):
        proof = consistency_proof(old, new, only(consistency_nodes(old, new)))
        assert proof == (subproof(old, DATA[:new], True) if old else [])
        verify_consistency(old, new, mth(DATA[:old]), mth(DATA[:new]), proof)


@given(st.integers(0, MOST), st.sets(st.integers(0, MOST - 1), max_size=12))
@settings(max_examples=150, deadline=None)
def test_subset_proofs_are_those_of_the_definition_and_hold(size: int, chosen: set[int]) -> None:
    wanted = {i for i in chosen if i < size}
    proof = subset_proof(wanted, size, only(subset_nodes(wanted, size)))
    assert proof == (without(wanted, DATA[:size]) if size else [])
    verify_subset({i: LEAVES[i] for i in wanted}, size, proof, mth(DATA[:size]))


def test_every_single_change_of_an_inclusion_proof_is_refused() -> None:
    for size in (1, 2, 3, 7, 8, 13):
        root = mth(DATA[:size])
        for index in range(size):
            proof = path(index, DATA[:size])
            wrong = [(LEAVES[index], i, size, proof, root) for i in range(-1, size + 3) if i != index]
            wrong += [(LEAVES[index], index, size, p, root) for p in spoilt(proof)]
            wrong += [(LEAVES[index - 1] if size > 1 else LEAVES[20], index, size, proof, root)]
            wrong += [(LEAVES[index], index, size, proof, mth(DATA[: size + 1])), (root, index, size, [], LEAVES[20])]
            for leaf, i, n, p, r in wrong:
                with refused():
                    verify_inclusion(leaf, i, n, p, r)


def test_every_single_change_of_a_consistency_proof_is_refused() -> None:
    roots = [mth(DATA[:n]) for n in range(MOST)]
    for old, new in ((1, 2), (1, 8), (3, 7), (4, 7), (6, 8), (7, 8), (8, 13), (11, 21)):
        proof = subproof(old, DATA[:new], True)
        wrong = [(o, new, roots[old], roots[new], proof) for o in range(1, new + 2) if o != old]
        wrong += [(old, new, roots[old], roots[new], p) for p in spoilt(proof)]
        wrong += [(old, new, roots[old - 1], roots[new], proof), (old, new, roots[old], roots[new - 1], proof)]
        wrong += [(old, new, roots[new], roots[old], proof), (new, old, roots[new], roots[old], proof)]
        wrong += [(new, new, roots[old], roots[new], []), (0, new, roots[old], roots[new], [])]
        wrong += [(0, new, EMPTY_ROOT, roots[new], proof), (new, new, roots[new], roots[new], proof)]
        for o, n, a, b, p in wrong:
            with refused():
                verify_consistency(o, n, a, b, p)


def test_every_single_change_of_a_subset_proof_is_refused() -> None:
    size, wanted = 13, {2, 3, 9}
    root, leaves = mth(DATA[:size]), {i: LEAVES[i] for i in wanted}
    proof = without(wanted, DATA[:size])
    for p in spoilt(proof):
        with refused():
            verify_subset(leaves, size, p, root)
    moved = {**leaves, 10: leaves[9]}
    del moved[9]
    for other in (
        {**leaves, 3: LEAVES[4]},
        {i: leaves[i] for i in (2, 3)},
        moved,
        {**leaves, 4: LEAVES[4]},
        {**leaves, size: LEAVES[3]},
        {**leaves, -1: LEAVES[3]},
    ):
        with refused():
            verify_subset(other, size, proof, root)
    for n in (0, 12, 17, 2**63):  # 14 to 16 have the same shape: only the signature says which
        with refused():
            verify_subset(leaves, n, proof, root)


def spoilt(proof: list[bytes]) -> list[list[bytes]]:
    """The proof with one bit flipped, one hash less, more, moved, or cut."""
    flipped = [[*proof[:i], bytes([h[0] ^ 8, *h[1:]]), *proof[i + 1 :]] for i, h in enumerate(proof)]
    shorter = [[*proof[:i], *proof[i + 1 :]] for i in range(len(proof))]
    longer = [[*proof[:i], LEAVES[30], *proof[i:]] for i in range(len(proof) + 1)]
    swapped = [[*proof[:i], b, a, *proof[i + 2 :]] for i, (a, b) in enumerate(pairwise(proof))]
    return [*flipped, *shorter, *longer, *swapped, [*proof, b""], [h[:31] for h in proof] or [b"x"]]


def test_a_proof_longer_than_the_tree_is_high_is_refused_even_where_it_leads_to_the_root() -> None:
    with refused():
        verify_inclusion(LEAVES[1], 0, 1, [LEAVES[0]], mth(DATA[:2]))
    with refused():
        verify_inclusion(LEAVES[2], 0, 1, [mth(DATA[:2])], mth(DATA[:3]))
    with refused():
        verify_consistency(1, 2, LEAVES[0], mth(DATA[:4]), [LEAVES[1], mth(DATA[2:4])])


def test_an_empty_log_has_one_root() -> None:
    verify_consistency(0, 0, EMPTY_ROOT, EMPTY_ROOT, [])
    for old_root, new_root in ((EMPTY_ROOT, LEAVES[0]), (LEAVES[0], LEAVES[0]), (LEAVES[0], EMPTY_ROOT)):
        with refused():
            verify_consistency(0, 0, old_root, new_root, [])


def test_hashes_of_other_lengths_that_join_to_the_same_bytes_are_refused() -> None:
    root, longer, shorter = mth(DATA[:2]), LEAVES[0] + LEAVES[1][:1], LEAVES[1][1:]
    assert hashlib.sha256(b"\x01" + longer + shorter).digest() == root
    with refused():
        verify_inclusion(shorter, 1, 2, [longer], root)
    with refused():
        verify_consistency(1, 2, longer, root, [shorter])
    with refused():
        verify_subset({0: longer, 1: shorter}, 2, [], root)


def test_a_tree_nobody_could_build_costs_nothing_to_refuse() -> None:
    root = mth(DATA)
    with refused():
        verify_inclusion(LEAVES[0], 0, 2**62, [root] * 61, root)
    with refused():
        verify_subset({0: LEAVES[0], 2**62: LEAVES[1]}, 2**63 - 1, [root] * 10, root)
    with refused():
        verify_consistency(2**61, 2**62, root, root, [root])


@pytest.mark.parametrize(
    ("ask", "field"),
    [
        (lambda: root_nodes(-1), "size"),
        (lambda: inclusion_nodes(3, 3), "index"),
        (lambda: inclusion_nodes(-1, 3), "index"),
        (lambda: consistency_nodes(4, 3), "old_size"),
        (lambda: consistency_nodes(-1, 3), "old_size"),
        (lambda: subset_nodes([1, 3], 3), "indexes"),
        (lambda: subset_nodes([-1], 3), "indexes"),
    ],
)
def test_what_cannot_be_proved_is_refused_by_name(ask, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        ask()
    assert caught.value.field == field


def test_a_missing_hash_is_named() -> None:
    nodes = only(inclusion_nodes(0, 13))
    del nodes[2, 1]
    with pytest.raises(LogVerificationError, match="node 1 of level 2 is missing"):
        inclusion_proof(0, 13, nodes)

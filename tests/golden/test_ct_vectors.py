"""The Merkle tree, signed notes and envelopes against vectors that others published."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tg_tinker.transparency.dsse import pae
from tg_tinker.transparency.merkle import (
    EMPTY_ROOT,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    node_hash,
    root_from,
    root_of,
    verify_consistency,
    verify_inclusion,
    verify_subset,
)
from tg_tinker.transparency.note import Checkpoint, VerifierKey, open_note, sign_note

HERE = Path(__file__).parent
TREE: dict[str, Any] = json.loads((HERE / "ct_merkle.json").read_text())
NOTES: dict[str, Any] = json.loads((HERE / "ct_notes.json").read_text())

LEAVES = [leaf_hash(bytes.fromhex(leaf)) for leaf in TREE["leaves"]]
ROOTS = [bytes.fromhex(root) for root in (TREE["empty_root"], *TREE["roots"])]


def raw(hashes: list[str]) -> list[bytes]:
    return [bytes.fromhex(h) for h in hashes]


def nodes() -> dict[tuple[int, int], bytes]:
    """Every complete subtree of the eight leaves."""
    found = {(0, i): h for i, h in enumerate(LEAVES)}
    for level in (1, 2, 3):
        for i in range(8 >> level):
            found[level, i] = node_hash(found[level - 1, 2 * i], found[level - 1, 2 * i + 1])
    return found


@pytest.mark.parametrize("size", range(9))
def test_the_published_roots(size: int) -> None:
    assert root_of(LEAVES[:size]) == root_from(size, nodes()) == ROOTS[size]
    assert ROOTS[0] == EMPTY_ROOT


@pytest.mark.parametrize("case", TREE["inclusion"], ids=lambda c: f"{c['index']} of {c['size']}")
def test_the_published_inclusion_proofs(case: dict[str, Any]) -> None:
    index, size, proof = case["index"], case["size"], raw(case["proof"])
    assert inclusion_proof(index, size, nodes()) == proof
    verify_inclusion(LEAVES[index], index, size, proof, ROOTS[size])
    in_order = proof if index == 0 else inclusion_left_to_right(index, size, proof)
    verify_subset({index: LEAVES[index]}, size, in_order, ROOTS[size])


def inclusion_left_to_right(index: int, size: int, proof: list[bytes]) -> list[bytes]:
    """The same hashes as a subset proof of one leaf has them; by hand for the published cases."""
    order = {(5, 8): (2, 0, 1), (2, 3): (0,), (1, 5): (0, 1, 2)}[index, size]
    return [proof[i] for i in order]


@pytest.mark.parametrize("case", TREE["consistency"], ids=lambda c: f"{c['old_size']} to {c['new_size']}")
def test_the_published_consistency_proofs(case: dict[str, Any]) -> None:
    old, new, proof = case["old_size"], case["new_size"], raw(case["proof"])
    assert consistency_proof(old, new, nodes()) == proof
    verify_consistency(old, new, ROOTS[old], ROOTS[new], proof)


@pytest.mark.parametrize("case", NOTES["notes"], ids=lambda c: c["verifier_key"].partition("+")[0])
def test_the_published_notes(case: dict[str, Any]) -> None:
    key = VerifierKey.parse(case["verifier_key"])
    assert key.text == case["verifier_key"]
    assert open_note(case["note"], key) == case["body"]


def test_signing_as_go_does_gives_gos_note() -> None:
    case = NOTES["notes"][1]
    seed = base64.b64decode(case["signer_key"].split("+", 4)[4])[1:]
    private = Ed25519PrivateKey.from_private_bytes(seed)
    assert sign_note(case["body"], VerifierKey.parse(case["verifier_key"]), private.sign) == case["note"]


def test_the_published_checkpoint() -> None:
    case = NOTES["checkpoint"]
    checkpoint = Checkpoint.parse(case["body"])
    assert checkpoint == Checkpoint(case["origin"], case["size"], bytes.fromhex(case["root"]))
    assert checkpoint.body() == case["body"]


def test_the_published_encoding_of_dsse() -> None:
    case = NOTES["dsse"]
    assert pae(case["payload_type"], case["payload"].encode()) == case["pae"].encode()

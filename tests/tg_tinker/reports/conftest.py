"""A log and a signer in a few lines, so that reports can be made honestly, and forged with the real key."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tg_tinker.ledger import LEDGER_DOMAIN, START, entry_hash
from tg_tinker.ledger.history import read_history
from tg_tinker.ledger.releases import Release, histogram
from tg_tinker.privacy import accounting
from tg_tinker.reports import recompute
from tg_tinker.reports.documents import verify_document
from tg_tinker.reports.statement import PAYLOAD_TYPE, Figures, statement
from tg_tinker.reports.verdicts import Trust
from tg_tinker.transparency import dsse, merkle, note

EVENT = {"kind": "sampled_gaussian", "noise_multiplier": "1.0", "sample_rate": "0.1", "vouched_by": "client"}
DELTA = 1e-5
FIGURES: dict[Any, Figures] = {}  # many tests, one history


@dataclass
class Forge:
    """One tenant's log; ``chain`` is the dataset's part of it. Nothing in here is checked."""

    secret: Ed25519PrivateKey = field(default_factory=lambda: Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
    dataset_id: str = "data-1"
    target: str = "8.0"
    delta: str = repr(DELTA)
    leaves: list[bytes] = field(default_factory=list)
    chain: list[tuple[dict[str, Any], int]] = field(default_factory=list)

    @property
    def key(self) -> note.VerifierKey:
        return note.VerifierKey.of(self.secret.public_key().public_bytes_raw())

    def append(self, kind: str, **body: Any) -> dict[str, Any]:
        before = entry_hash(LEDGER_DOMAIN, self.chain[-1][0]) if self.chain else START
        whole = {
            "run_id": "",
            **body,
            "kind": kind,
            "dataset_id": self.dataset_id,
            "position": len(self.chain),
            "prev_hash": before.hex(),
            "time": f"2026-01-02T03:04:{len(self.chain) % 60:02}+00:00",
        }
        self.chain.append((whole, len(self.leaves)))
        self.leaves.append(rfc8785.dumps(whole))
        return whole

    def elsewhere(self, count: int = 1) -> Forge:
        """Entries of other datasets and of the audit log, between."""
        for _ in range(count):
            self.leaves.append(rfc8785.dumps({"operation": "sample", "n": len(self.leaves)}))
        return self

    def terms(self, **more: Any) -> dict[str, Any]:
        unit = {"unit": "datum", "neighbours": "add-or-remove-one"}
        return {**unit, "target_epsilon": self.target, "target_delta": self.delta, **more}

    def open(self, run: str = "run_a", event: Mapping[str, Any] = EVENT, **more: Any) -> Forge:
        self.append("open", run_id=run, mechanism=dict(event), **{"initial_weights": "base", **self.terms(**more)})
        return self

    def cost(self, events: list[Mapping[str, Any]]) -> float:
        counts = histogram(Release.from_json(e) for e in events)
        return float("inf") if counts is None else accounting.gate_epsilon(counts, float(self.delta))

    def charge(self, seq: int, run: str = "run_a", event: Mapping[str, Any] = EVENT, **more: Any) -> dict[str, Any]:
        events = [b["event"] for b, _ in self.chain if b["kind"] == "charge"]
        if "epsilon_after" not in more:
            more = {**more, "epsilon_after": repr(self.cost([*events, event]))}
        return self.append(
            "charge",
            **{
                "run_id": run,
                "seq": seq,
                "attempt": 1,
                "event": dict(event),
                "unit": "datum",
                "neighbours": "add-or-remove-one",
                "accountant": "rdp",
                "delta": self.delta,
                **more,
            },
        )

    def settle(self, charge: Mapping[str, Any], outcome: str = "released") -> None:
        step = {k: charge[k] for k in ("run_id", "seq", "attempt")}
        position = charge["position"]
        self.append("settle", **step, charge_position=position, outcome=outcome, update_hash="sha256:00")

    def spend(self, charges: int) -> Forge:
        for seq in range(1, charges + 1):
            self.charge(seq)
        return self

    def unnoised(self) -> Forge:
        self.charge(1, event={"kind": "unnoised"})
        return self

    def settled_again(self) -> Forge:
        self.settle(next(b for b, _ in self.chain if b["kind"] == "charge"))
        return self

    def refund(self) -> Forge:
        self.append("refund", epsilon="1.0")
        return self

    def raised(self, before: str, after: str) -> Forge:
        act = {"seq": len(self.chain), "reason": "more data", "actor": "key_1", "request_id": "r"}
        self.append("raise", from_epsilon=before, target_epsilon=after, **act)
        return self

    def close(self, **more: Any) -> Forge:
        charges = [b for b, _ in self.chain if b["kind"] == "charge"]
        spent = charges[-1]["epsilon_after"] if charges else "0.0"
        body = {"epsilon": spent, "delta": self.delta, "charges": len(charges), "seq": len(self.chain)}
        self.append("report", **{**body, **more})
        return self

    def integrity(self) -> dict[str, Any]:
        size = self.chain[-1][1] + 1
        hashes = [merkle.leaf_hash(leaf) for leaf in self.leaves[:size]]
        wanted = {i for _, i in self.chain}
        body = note.Checkpoint(self.key.name, size, merkle.root_of(hashes)).body()
        return {
            "origin": self.key.name,
            "verifier_key": self.key.text,
            "checkpoint": note.sign_note(body, self.key, self.secret.sign),
            "proof": [h.hex() for h in naive_subset(hashes, wanted, 0)],
            "entries": [{"body": copy.deepcopy(b), "leaf_index": i} for b, i in self.chain],
        }

    def document(self) -> dict[str, Any]:
        """The report that an honest server would write over this chain."""
        history = read_history(self.dataset_id, [b for b, _ in self.chain])
        time, known = self.chain[-1][0]["time"], (tuple(history.releases), history.in_force.target_delta)
        figures = FIGURES[known] if known in FIGURES else FIGURES.setdefault(known, recompute.figures(history))
        made = statement(history, figures, time=time, server_version="0.1.0", integrity=self.integrity())
        parsed: dict[str, Any] = json.loads(rfc8785.dumps(made))
        return parsed

    def sign(self, document: Any = None, payload_type: str = PAYLOAD_TYPE) -> bytes:
        payload = document if isinstance(document, bytes) else rfc8785.dumps(document or self.document())
        return rfc8785.dumps(dsse.sign_envelope(payload_type, payload, self.key, self.secret.sign))

    def trust(self, **more: Any) -> Trust:
        return Trust(keys=[self.key], **more)


def naive_subset(hashes: list[bytes], wanted: set[int], start: int) -> Iterator[bytes]:
    """The hashes of all largest subtrees without a wanted leaf, straight from RFC 6962's recursion."""
    if not wanted & set(range(start, start + len(hashes))):
        yield merkle.root_of(hashes)
    elif len(hashes) > 1:
        split = 1
        while split * 2 < len(hashes):
            split *= 2
        yield from naive_subset(hashes[:split], wanted, start)
        yield from naive_subset(hashes[split:], wanted, start + split)


def settled_forge(**settings: Any) -> Forge:
    """Two runs, five charges: released, failed, unsettled; entries of others between."""
    forge = Forge(**settings).elsewhere(2).open()
    for seq in (1, 2, 3):
        forge.settle(forge.charge(seq), "failed" if seq == 2 else "released")
    forge.elsewhere().open("run_b")
    forge.settle(forge.charge(1, "run_b"))
    forge.charge(2, "run_b")
    return forge.elsewhere(3)


@pytest.fixture
def forge() -> Forge:
    """A dataset with two runs, not yet reported on."""
    return settled_forge()


Refusal = Callable[..., str]


@pytest.fixture
def refusal() -> Refusal:
    """``refusal(data, trust)`` is the check that refuses, and why; it fails if nothing does."""
    from tg_tinker.errors import InvalidRequestError

    def of(data: bytes, trust: Trust) -> str:
        with pytest.raises(InvalidRequestError) as caught:
            list(verify_document(data, trust))
        assert caught.value.details["check"] == caught.value.message.split(":")[0]
        return caught.value.message

    return of

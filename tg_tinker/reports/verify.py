"""Checks a privacy report with nothing but itself: no network, no server, no trust in its numbers.

Everything the report says is derived again from the entries in it, and the entries from the signed log. What no
check can show: that the log is the one that others see. For that there are receipts, and checkpoints seen before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import rfc8785

from tg_tinker.errors import InvalidRequestError, LogVerificationError
from tg_tinker.ledger import LEDGER_DOMAIN, START, ChainEntry, entry_hash, verify_chain
from tg_tinker.ledger.history import History, read_history
from tg_tinker.ledger.releases import histogram
from tg_tinker.reports import recompute
from tg_tinker.reports.statement import FORMAT, PAYLOAD_TYPE, Figures, rounded_up, small, statement
from tg_tinker.reports.verdicts import REGISTRY, Document, Verdict, refused, same
from tg_tinker.transparency.merkle import leaf_hash, verify_subset
from tg_tinker.transparency.note import Checkpoint, VerifierKey

# The sections of a report, in the order in which they are compared, and the check that a difference fails.
SECTIONS: Final = (
    ("guarantee", "guarantee"),
    ("coverage", "coverage"),
    ("sampling", "coverage"),
    ("assumptions", "coverage"),
    ("mechanism", "coverage"),
    ("curve", "curve"),
    ("accounting", "accounting"),
    ("privacy_profile", "accounting"),
    ("empirical_audit", "empirical audit"),
)
_HEADER: Final = ("format", "prepared", "dataset_id", "time", "server_version", "trust_model", "integrity")
_INTEGRITY: Final = ("origin", "verifier_key", "checkpoint", "proof", "entries")
_LOOSE: Final = 1e-3  # between versions of dp-accounting, and for an estimate: relative above 1


@REGISTRY.register(PAYLOAD_TYPE)
def verify_report(document: Document) -> Iterator[Verdict]:
    """Check a report to the end; see :meth:`Registry.verify`."""
    report = document.value
    _check_shape(report)
    yield Verdict("format", f"{FORMAT}, every field known")
    log = _Log.read(report["integrity"], document.key)
    yield Verdict("checkpoint", f"the signer's own log, {log.checkpoint.size} leaves, ends with this report")
    dataset_id = str(report["dataset_id"])
    entries = _chain(log, dataset_id)
    yield Verdict("chain", f"{len(entries)} entries of the dataset from its first on, none missing, none moved")
    _check_leaves(log)
    yield Verdict("leaves", "each of them is a leaf of that log")
    history = _history(dataset_id, log.bodies)
    yield Verdict("last entry", f"the last one is this report's own, over {len(history.charges)} charges")
    try:
        yield from _numbers(report, history)
    except (
        ArithmeticError,
        MemoryError,
    ) as e:  # numbers that no training has: what cannot be computed is not believed
        raise refused("epsilon", f"it cannot be computed from these entries ({type(e).__name__})") from e
    yield from _receipts(document, dataset_id, log)


def _check_shape(report: Mapping[str, Any]) -> None:
    known = {*_HEADER, *(name for name, _ in SECTIONS)}
    if report.get("format") != FORMAT:
        raise refused("format", f"it says it is {str(report.get('format'))[:100]!r}, not {FORMAT!r}")
    odd = sorted(known ^ set(report))
    if odd:
        raise refused("format", f"it has too many or too few fields: {', '.join(odd)[:200]}")
    texts = [report["dataset_id"], report["time"], report["server_version"]]
    integrity = report["integrity"]
    if (
        not isinstance(integrity, dict)
        or set(integrity) != set(_INTEGRITY)
        or not all(isinstance(t, str) for t in texts)
    ):
        raise refused("format", f"its integrity section does not have exactly the fields {', '.join(_INTEGRITY)}")


@dataclass(frozen=True, slots=True)
class _Log:
    """What the integrity section shows, its signatures checked and nothing else."""

    checkpoint: Checkpoint
    bodies: Sequence[Mapping[str, Any]]
    indexes: Sequence[int]
    proof: Sequence[bytes]

    @classmethod
    def read(cls, integrity: Mapping[str, Any], key: VerifierKey) -> _Log:
        if integrity["verifier_key"] != key.text or integrity["origin"] != key.name:
            raise refused("checkpoint", "it names another log than that of the key that signed it")
        try:
            checkpoint = Checkpoint.open(str(integrity["checkpoint"]), key)
        except LogVerificationError as e:
            raise refused("checkpoint", e.message) from e
        try:
            bodies = [dict(e["body"]) for e in integrity["entries"]]
            indexes = [e["leaf_index"] for e in integrity["entries"]]
            proof = [bytes.fromhex(h) for h in integrity["proof"]]
            shaped = all(set(e) == {"body", "leaf_index"} for e in integrity["entries"])
            shaped = shaped and [p.hex() for p in proof] == integrity["proof"]
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise refused("format", "an entry or a hash of its integrity section is not in its form") from e
        whole = all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in indexes)
        if not shaped or not whole or not bodies:
            raise refused("format", "an entry or a hash of its integrity section is not in its form")
        if sorted(set(indexes)) != indexes:
            raise refused("leaves", "its entries do not stand in the log in the order of the dataset")
        if checkpoint.size != indexes[-1] + 1:
            raise refused(
                "checkpoint",
                f"it is of {checkpoint.size} leaves, and the last entry shown is leaf {indexes[-1]}: entries "
                "after it may be missing, or the checkpoint is a stale one",
            )
        return cls(checkpoint, bodies, indexes, proof)


def _chain(log: _Log, dataset_id: str) -> list[ChainEntry]:
    """The dataset's chain; its hashes are computed here, and each must be named by the entry after it."""
    entries = [ChainEntry(body, entry_hash(LEDGER_DOMAIN, body)) for body in log.bodies]
    if log.bodies[0].get("prev_hash") != START.hex():
        raise refused("chain", "its first entry is not the first of the dataset; the beginning was cut off")
    try:
        verify_chain(entries)
    except InvalidRequestError as e:
        raise refused("chain", e.message) from e
    foreign = next((e for e in entries if e.body.get("dataset_id") != dataset_id), None)
    if foreign is not None:
        raise refused("chain", f"the entry at {foreign.position} is of another dataset than the report names")
    return entries


def _check_leaves(log: _Log) -> None:
    leaves = {i: leaf_hash(rfc8785.dumps(dict(b))) for i, b in zip(log.indexes, log.bodies, strict=True)}
    try:
        verify_subset(leaves, log.checkpoint.size, log.proof, log.checkpoint.root)
    except LogVerificationError as e:
        raise refused("leaves", e.message) from e


def _history(dataset_id: str, bodies: Sequence[Mapping[str, Any]]) -> History:
    try:
        history = read_history(dataset_id, bodies)
    except InvalidRequestError as e:
        raise refused("entries", e.message) from e
    if bodies[-1]["kind"] != "report":
        raise refused("last entry", "the last entry is not a report's own: what came after it may have been left out")
    return history


def _numbers(report: Mapping[str, Any], history: History) -> Iterator[Verdict]:
    """Everything that follows from the entries, computed again and compared."""
    terms = history.in_force
    expected = statement(
        history,
        _said_figures(report),
        time=str(history.reports[-1]["time"]),
        server_version=report["server_version"],
        integrity=report["integrity"],
    )
    for name in ("prepared", "time", "trust_model", "dataset_id"):
        same(name, "format", report[name], expected[name])
    shown = {
        "guarantee": f"dataset {history.dataset_id!r} at {expected['time']}: epsilon "
        f"{rounded_up(history.epsilon_spent)} at delta {small(terms.target_delta)}, unit {terms.unit}, target "
        f"{terms.target_epsilon:g}, the terms of the ledger and its last charge",
        "coverage": f"{len(history.runs)} runs, {len(history.charges)} charges, with how each ended and who vouches "
        "for its batch, as the entries have them",
        "curve": "as charged",
    }
    for name, check in SECTIONS[:6]:
        same(name, check, report[name], expected[name])
        if name in ("guarantee", "mechanism", "curve"):
            yield Verdict(check, shown[check])
    try:
        recompute.refuse_too_many_kinds(history)
    except InvalidRequestError as e:
        raise refused("epsilon", e.message) from e
    fault = recompute.first_fault(history)
    if fault is not None:
        raise refused("epsilon", f"the charge at position {fault.position} is wrong: {fault.why}")
    yield Verdict("epsilon", f"{rounded_up(history.epsilon_spent, 6)}, computed again from every charge")
    below = recompute.understated(history)
    if below is not None:
        raise refused(
            "second accountant",
            f"the report claims epsilon {history.epsilon_spent}, and the same releases have at least {below} by "
            "privacy loss distributions: the claim is understated",
        )
    computed = recompute.figures(history)
    _check_figures(report, computed)
    for name, check in SECTIONS[6:]:
        same(name, check, report[name], expected[name])
    yield Verdict("second accountant", _second_opinion(history, computed.pld))


def _second_opinion(history: History, pld: float) -> str:
    """What the second accountant was good for, in words."""
    if math.isfinite(pld):
        above = pld > history.epsilon_spent
        compared = "and no less than it by an estimate from below" if above else "not above it"
        return f"{rounded_up(pld, 6)} by privacy loss distributions (dp-accounting), {compared}"
    if math.isinf(history.epsilon_spent):
        return "not asked: epsilon is infinite"
    counts = histogram(history.releases) or {}
    if recompute.loss_distribution(counts) is None:
        return f"NOT computed, for {len(counts):,} kinds of releases: epsilon rests on the gate's arithmetic alone"
    return "NOT able to say anything at so small a delta: epsilon rests on the gate's arithmetic alone"


def _said_figures(report: Mapping[str, Any]) -> Figures:
    """The accountants' figures as the report states them, to be compared with those computed here."""
    try:
        accounting = report["accounting"]
        estimate, check = accounting["estimate"], accounting["cross_check"]["epsilon"]
        return Figures(
            rdp=_number(accounting["rdp"]),
            pld=math.inf if check == "not computed" else _number(check),
            gdp=None if estimate is None else _number(estimate["epsilon"]),
            profile=tuple(
                (_number(p["delta"]), _number(p["rdp"]), _number(p["pld"])) for p in report["privacy_profile"]
            ),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise refused("format", "a number of its accounting is missing or is not a decimal string") from e


def _number(text: object) -> float:
    if not isinstance(text, str) or repr(float(text)) != text or math.isnan(float(text)):
        raise ValueError(text)
    return float(text)


def _check_figures(report: Mapping[str, Any], computed: Figures) -> None:
    said = _said_figures(report)
    pairs = [
        ("rdp", said.rdp, computed.rdp, recompute.TOLERANCE),
        ("the cross-check", said.pld, computed.pld, _LOOSE),
        ("the estimate", said.gdp, computed.gdp, _LOOSE),
    ]
    if [p[0] for p in said.profile] != [p[0] for p in computed.profile]:
        raise refused("accounting", "its privacy profile is not at the deltas of the format")
    for ours, theirs in zip(computed.profile, said.profile, strict=True):
        pairs.append((f"rdp at delta {ours[0]:g}", theirs[1], ours[1], recompute.TOLERANCE))
        pairs.append((f"pld at delta {ours[0]:g}", theirs[2], ours[2], _LOOSE))
    for name, stated, right, slack in pairs:
        if stated == right:
            continue
        # inf within any slack of inf is everything: what was not computed has no number near it
        if stated is None or right is None or math.isinf(right) or not abs(stated - right) <= slack * max(1.0, right):
            raise refused("accounting", f"{name} is {stated} in the report, and {right} computed from its entries")


def _receipts(document: Document, dataset_id: str, log: _Log) -> Iterator[Verdict]:
    """What this user's own programs saw of the log, against what the report shows of it."""
    key, trust, size = document.key, document.trust, log.checkpoint.size
    shown = dict(zip(log.indexes, log.bodies, strict=True))
    receipts = [] if trust.receipts is None else trust.receipts.read_all(key.name, dataset_id)
    for receipt in receipts:
        try:
            receipt.verify(key)
        except LogVerificationError as e:
            raise refused("receipts", f"one of your own receipts is damaged: {e.message}") from e
        entry, index = receipt.entry, receipt.leaf_index
        if index < size and (index not in shown or rfc8785.dumps(dict(shown[index])).decode() != entry):
            raise refused(
                "receipts",
                f"you hold a receipt for an entry at leaf {index} of this log, and the report leaves it out or has "
                "another in its place: the log was forked",
            )
    pin = None if trust.pins is None else trust.pins.get(key.name)
    if pin is not None and pin.checkpoint.size == size and pin.checkpoint.root != log.checkpoint.root:
        raise refused("receipts", f"you saw this log with another root at the same size, {size}: it was forked")
    older = sum(r.leaf_index < size for r in receipts)
    none = "no receipts of this dataset from before it are kept here, so nothing of your own to compare with"
    said = f"all {older} of your own receipts from before it are among the entries" if older else none
    if older < len(receipts):
        said += (
            f"; {len(receipts) - older} of yours are NEWER: the dataset was used again since; ask for a new report"
        )
    elif pin is not None and pin.checkpoint.size > size:
        said += f"; you saw the log with {pin.checkpoint.size - size} entries more, of this dataset or others"
    yield Verdict("receipts", said)

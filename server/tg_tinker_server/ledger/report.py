"""The privacy report of a dataset: the guarantee, how it was computed, what it does not cover."""

from __future__ import annotations

import json
import math
from importlib.metadata import version
from typing import Any

from tg_tinker.ledger import LedgerEntry
from tg_tinker_server.dp.accounting import Costs, add, cost, epsilon, gdp_estimate, pld_epsilon, zero
from tg_tinker_server.dp.events import (
    Event,
    ParticipationGaussian,
    SampledGaussian,
    amplified,
    event_from_json,
    event_to_json,
)
from tg_tinker_server.ledger.privacy_ledger import PrivacyLedger
from tg_tinker_server.ledger.reservation import NEIGHBOURS, DatasetScope

FORMAT = "tg-tinker/privacy-report/v1"
GATES = {
    "rdp": "Renyi DP with integer costs rounded up, composed adaptively",
    "prv": "privacy loss distribution of one schedule that was fixed before anything was released",
}
NOT_COVERED = (
    "Losses, gradient norms and other diagnostics returned to the data's owner are exact and not covered.",
    "Choices made by looking at private data outside this server (cleaning, tuning, stopping) are not covered.",
    "Groups of related units are covered only at a multiple of epsilon.",
    "The base model's own training data is not covered.",
)


def privacy_report(ledger: PrivacyLedger, scope: DatasetScope) -> dict[str, Any]:
    """Everything the ledger says about a dataset, as JSON values; numbers that matter are decimal strings.

    Epsilon is folded from all charges of all runs, failed ones included, by Renyi DP; a second accountant
    (privacy loss distributions, dp_accounting) computes it independently.
    """
    spent = ledger.spent(scope)
    entries = ledger.entries(scope)[: spent.entries]  # what was appended in between is the next report's
    charges = [e for e in entries if e.kind == "charge"]
    events = [event_from_json(e.body["event"]) for e in charges]
    pld = pld_epsilon(events, spent.delta)
    gdp = gdp_estimate(events, spent.delta) if events else None
    return {
        "format": FORMAT,
        "dataset_id": scope.dataset_id,
        "guarantee": {
            "sentence": _sentence(spent.epsilon, spent.delta, spent.unit),
            "epsilon": repr(spent.epsilon),
            "delta": repr(spent.delta),
            "target_epsilon": "inf" if spent.target_epsilon is None else repr(spent.target_epsilon),
            "privacy_unit": spent.unit,
            "neighbours": NEIGHBOURS,
        },
        "curve": _curve(charges, events, spent.delta),
        "runs": _runs(entries),
        "mechanism": {
            "name": "DP-SGD: per-unit clipping, Gaussian noise on the sum, a public divisor",
            "releases": _releases(events),
            "noise_source": "keystream cipher keyed by the operating system; no user seed, never saved",
        },
        "sampling": _sampling(events),
        "assumptions": _assumptions(events),
        "accounting": {
            "accountant": charges[-1].body["accountant"] if charges else "rdp",
            "gate": GATES[charges[-1].body["accountant"] if charges else "rdp"],
            "rdp": repr(epsilon(_total(events), spent.delta)),
            "cross_check": {
                "accountant": "pld (dp_accounting)",
                "epsilon": repr(pld) if math.isfinite(pld) or not math.isfinite(spent.epsilon) else "not computed",
            },
            "estimate": None
            if gdp is None
            else {"accountant": "gdp", "epsilon": repr(gdp), "note": "a central-limit estimate, NOT an upper bound"},
        },
        "trust_model": "The owner of the data and this server are trusted; whoever receives the model is not.",
        "not_covered": [*NOT_COVERED, *_attested_weights(entries)],
        "integrity": {"entries": len(entries), "head": spent.head.hex(), "hash": "SHA-256 chain over RFC 8785 JSON"},
        "server_version": version("tg-tinker"),
    }


def _attested_weights(entries: list[LedgerEntry]) -> list[str]:
    runs = [e.body["run_id"] for e in entries if e.body.get("initial_weights") == "public"]
    if not runs:
        return []
    return [f"Checkpoints loaded into {', '.join(runs)} are public by attestation of the client and not covered."]


def _sentence(spent: float, delta: float, unit: str) -> str:
    what = "record" if unit == "datum" else unit
    if not math.isfinite(spent):
        return "An un-noised gradient was released: there is no finite guarantee."
    return (
        f"Adding or removing one {what} changes the probability of any outcome of the training by at most a "
        f"factor of exp({math.ceil(spent * 1000) / 1000:.3f}), except with probability {delta:g}."
    )


def _curve(charges: list[LedgerEntry], events: list[Event], delta: float) -> list[dict[str, Any]]:
    total, curve = zero(), []
    for entry, event in zip(charges, events, strict=True):
        total = add(total, cost(event))
        by_gate = repr(epsilon(total, delta))
        curve.append(
            {
                "position": entry.position,
                "run_id": entry.body["run_id"],
                "time": entry.body["time"],
                "epsilon": entry.body["epsilon_after"],
                "epsilon_rdp": by_gate,
            }
        )
    return curve


def _runs(entries: list[LedgerEntry]) -> list[dict[str, Any]]:
    runs: dict[str, dict[str, Any]] = {}
    for entry in entries:
        run = runs.setdefault(
            entry.body["run_id"], {"run_id": entry.body["run_id"], "charged": 0, "released": 0, "failed": 0}
        )
        if entry.kind == "charge":
            run["charged"] += 1
        elif entry.kind == "settle":
            run["released" if entry.body["outcome"] == "released" else "failed"] += 1
    for run in runs.values():
        run["unsettled"] = run["charged"] - run["released"] - run["failed"]
    return list(runs.values())


def _releases(events: list[Event]) -> list[dict[str, Any]]:
    counts: dict[str, int] = {}
    for event in events:
        text = json.dumps(event_to_json(event), sort_keys=True)
        counts[text] = counts.get(text, 0) + 1
    return [{"event": json.loads(text), "times": times} for text, times in counts.items()]


def _assumptions(events: list[Event]) -> list[str]:
    """What has to be true of the batches, besides the arithmetic."""
    found = []
    if any(not amplified(e) for e in events):
        found.append(
            "Where batches were chosen: which units share a step does not depend on whether one of them is there; "
            "leaving a unit out leaves its place empty."
        )
    if any(isinstance(e, ParticipationGaussian) for e in events):
        found.append(
            "Where participation was counted: one unit goes by one name, or by one content, throughout a run."
        )
    if any(amplified(e) for e in events):
        found.append("Where batches were sampled: each unit was drawn on its own, with the stated probability.")
    return found


def _total(events: list[Event]) -> Costs:
    total = zero()
    for event in events:
        total = add(total, cost(event))
    return total


def _sampling(events: list[Event]) -> str:
    sampled = [e for e in events if isinstance(e, SampledGaussian) and amplified(e)]
    if not sampled:
        return "No amplification by sampling is claimed."
    who = {e.vouched_by for e in sampled}
    by = "attested by the client" if "client" in who else "drawn by the server"
    return f"Amplification by Poisson sampling is claimed for {len(sampled)} of {len(events)} releases, {by}."

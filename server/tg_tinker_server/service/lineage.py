"""What weights owe to other data than their run's own: promises made elsewhere, carried along as weights move.

An entry names a checkpoint, the log that vouches for it (``origin``, empty for our own) and what was promised on the
data behind it (``privacy``, ``None`` for nothing). A run's own ledger says nothing of these; an export lists all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tg_tinker.errors import DPUnsupportedError
from tg_tinker.exports.manifest import NO_HEAD, is_attested
from tg_tinker.types.federation import WeightsSource
from tg_tinker_server.artifacts.package import privacy_claim

IMPORTED = "imported"
"""Stands for the run of a checkpoint that came from elsewhere."""
Lineage = tuple[Mapping[str, Any], ...]


def lineage_after(before: Lineage, artifact_id: str, state: Mapping[str, Any], *, dataset_id: str | None) -> Lineage:
    """The lineage of a run on ``dataset_id`` once it has loaded a checkpoint.

    No promise in it is ever lost or made smaller. Rounds of one federated job share an entry.
    """
    found = [*before, *state.get("provenance", [])]
    claim = privacy_claim(state)
    inherited = claim is not None and claim["dataset_id"] != dataset_id
    if inherited and not is_foreign(state):
        base_model = state["config"]["model_ref"]
        found.append(
            {"artifact": artifact_id, "base_model": base_model, "manifest": "", "origin": "", "privacy": claim}
        )
    found = [entry for i, entry in enumerate(found) if entry not in found[:i]]
    return tuple(_one_of_each_job(found))


def federation_entry(source: WeightsSource, artifact_id: str, base_model: str) -> dict[str, Any]:
    """The entry of weights that a caller brought from a federated job."""
    privacy = {
        "attested_by": "caller",
        "dataset_id": source.dataset_id,
        "delta": repr(float(source.delta)),
        "entries": 0,
        "epsilon": repr(float(source.epsilon)),
        "head": NO_HEAD,
        "initial_weights": "base",
        "round": source.round,
        "unit": source.unit,
    }
    return {"artifact": artifact_id, "base_model": base_model, "manifest": "", "origin": "", "privacy": privacy}


def is_foreign(state: Mapping[str, Any]) -> bool:
    """Whether the promise in a checkpoint's state is one that our own ledger does not hold."""
    provenance: Sequence[Mapping[str, Any]] = state.get("provenance", [])
    return state["run_id"] == IMPORTED and any(entry["privacy"] == state["ledger"] for entry in provenance)


def has_finite_epsilon(privacy: Mapping[str, Any] | None) -> bool:
    """Whether a promise is one at all."""
    return privacy is not None and math.isfinite(float(privacy["epsilon"]))


def refuse_one_name_for_two_datasets(lineage: Lineage, dataset_id: str) -> None:
    """A private run cannot start from weights that another server trained on a dataset of the same name.

    If it is the same data, both sides' releases add up, and our ledger lacks theirs; nothing is assumed of it.

    Raises:
        DPUnsupportedError: it would.
    """
    for entry in lineage:
        privacy = entry["privacy"]
        if entry["origin"] and privacy is not None and privacy["dataset_id"] == dataset_id:
            raise DPUnsupportedError(
                f"these weights were trained on a dataset {dataset_id!r} whose epsilon of {privacy['epsilon']} is in "
                f"the ledger of {entry['origin']} and not in ours: the same people would be charged on two accounts",
                feature="checkpoint",
                reason="what was spent elsewhere on the same data would not count here",
                alternative="if the data is another, create the run under another dataset_id; if it is the same, "
                "go on where its ledger is",
            )


def _one_of_each_job(entries: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    """Rounds of one job as one entry: that of the newest round, at the largest epsilon and delta ever stated.

    A run that loads every round of a job would otherwise list each. The newest is enough, because its epsilon is
    stated over the whole job up to it: the rounds before are in it, not beside it. Should a caller state less for a
    later round, or load an earlier one again, the larger figure stays, so that no order of loading makes a promise
    look better. Statements on different units, or from different logs, cannot be compared: each keeps its entry.
    """
    kept: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for position, entry in enumerate(entries):
        privacy = entry["privacy"]
        stated = privacy is not None and is_attested(privacy)
        key = (entry["origin"], privacy["dataset_id"], privacy["unit"]) if stated else (position,)
        kept[key] = _newest(kept[key], entry) if key in kept else entry
    return kept.values()


def _newest(one: Mapping[str, Any], other: Mapping[str, Any]) -> Mapping[str, Any]:
    privacies = (one["privacy"], other["privacy"])
    newest = other if privacies[1]["round"] >= privacies[0]["round"] else one
    largest = {name: max((p[name] for p in privacies), key=float) for name in ("epsilon", "delta")}
    return {**newest, "privacy": {**newest["privacy"], **largest}}

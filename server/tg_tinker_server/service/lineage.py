"""What weights owe to other data than their run's own: promises made elsewhere, carried along as weights move.

An entry names a checkpoint, the log that vouches for it (``origin``, empty for our own) and what was promised on the
data behind it (``privacy``, ``None`` for nothing). A run's own ledger says nothing of these; an export lists all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tg_tinker.errors import DPUnsupportedError
from tg_tinker_server.artifacts.package import privacy_claim

IMPORTED = "imported"
"""Stands for the run of a checkpoint that came from another server."""
Lineage = tuple[Mapping[str, Any], ...]


def lineage_after(before: Lineage, artifact_id: str, state: Mapping[str, Any], *, dataset_id: str | None) -> Lineage:
    """The lineage of a run on ``dataset_id`` once it has loaded a checkpoint; it never gets shorter."""
    found = [*before, *state.get("provenance", [])]
    claim = privacy_claim(state)
    inherited = claim is not None and claim["dataset_id"] != dataset_id
    if inherited and not is_foreign(state):
        base_model = state["config"]["model_ref"]
        found.append(
            {"artifact": artifact_id, "base_model": base_model, "manifest": "", "origin": "", "privacy": claim}
        )
    return tuple(entry for i, entry in enumerate(found) if entry not in found[:i])


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

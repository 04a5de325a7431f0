"""What a checkpoint must be for a run to take it over, and what the run owes to it then."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tg_tinker.errors import DPUnsupportedError, InvalidRequestError
from tg_tinker.exports.manifest import is_attested
from tg_tinker.wire.runs import config_to_json
from tg_tinker_server.service.lineage import (
    Lineage,
    has_finite_epsilon,
    lineage_after,
    refuse_one_name_for_two_datasets,
)
from tg_tinker_server.service.paths import is_path
from tg_tinker_server.service.run import Run


def check_fits(run: Run, state: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another form than the run, or one whose cost to a private run is unknown.

    Raises:
        DPUnsupportedError: its privacy is unknown, or stands in a ledger that is not ours.
        InvalidRequestError: another base model or adapter.
    """
    _check_provenance(run, state)
    saved, here = _shape(state["config"]), _shape(json.loads(config_to_json(run.config)))
    different = [k for k in ("model_ref", "lora_config") if saved.get(k) != here[k]]
    if different:
        raise InvalidRequestError(
            f"the checkpoint was saved with another {' and '.join(different)}: "
            + "; ".join(f"{k} was {saved.get(k)}, this run has {here[k]}" for k in different),
            field="artifact_id",
            constraint="same base model and adapter",
        )


def takes_optimizer(asked_for: str, optimizer: bool | None, state: Mapping[str, Any]) -> bool:
    """Whether a load takes the optimizer over: what was said, or else of an id what was saved, of a path nothing.

    Raises:
        InvalidRequestError: it was asked for and not saved.
    """
    saved = bool(state["optimizer"])
    if optimizer and not saved:
        raise InvalidRequestError(
            "this checkpoint was saved without optimizer state; load it with optimizer=False or leave it out",
            field="optimizer",
            constraint="saved with include_optimizer=True",
        )
    return (saved and not is_path(asked_for)) if optimizer is None else optimizer


def lineage_with(run: Run, artifact_id: str, state: Mapping[str, Any]) -> Lineage:
    """What the run's weights owe to other data once it has loaded this checkpoint."""
    own = None if run.private is None else run.private.scope.dataset_id
    return lineage_after(run.lineage, artifact_id, state, dataset_id=own)


def _check_provenance(run: Run, state: Mapping[str, Any]) -> None:
    """A private run starts from nothing whose cost is unknown: an unknown never costs zero."""
    if run.private is None:
        return
    refuse_one_name_for_two_datasets(tuple(state.get("provenance", [])), run.private.scope.dataset_id)
    if run.private.config.initial_weights == "public":
        return
    ledger = state["ledger"]
    attested = ledger is not None and ledger.get("initial_weights") == "public"
    unknown = any(not has_finite_epsilon(e["privacy"]) for e in state.get("provenance", []))
    if unknown or ledger is None or attested or not has_finite_epsilon(ledger):
        how = (
            "further from such weights"
            if unknown
            else "without privacy"
            if ledger is None
            else "from weights without a ledger"
        )
        how = how if unknown or ledger is None or attested else "with an un-noised step"
        if ledger is not None and is_attested(ledger):
            how = "in a federation that promises nothing"
        raise DPUnsupportedError(
            f"this checkpoint was trained {how}, so what it reveals about its data is not in any budget",
            feature="checkpoint",
            reason="weights of unknown privacy would count as free",
            alternative="start from the base model, or, if it was trained on public data only, create the run "
            "with DPConfig(initial_weights='public')",
        )


def _shape(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration without what may differ from the checkpoint's: which factor of an adapter is trained."""
    lora = config.get("lora_config")
    return config if lora is None else {**config, "lora_config": {**lora, "frozen_factor": None}}

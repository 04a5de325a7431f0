"""The entries that set and change a dataset's terms: register, raise, erase. Pure: bodies from values.

A target is only ever raised, and nothing here touches what was spent.
"""

from __future__ import annotations

import math
from typing import Any

from tg_tinker.errors import InvalidRequestError
from tg_tinker_server.dp.events import Event, SampledGaussian
from tg_tinker_server.ledger.fold import Fold, Terms
from tg_tinker_server.ledger.reservation import NEIGHBOURS, DatasetScope

MAX_REASON = 200


def terms_of(*, unit: str, target_epsilon: float | None, target_delta: float) -> Terms:
    """Terms from settings, where an infinite target is no target."""
    target = target_epsilon if target_epsilon is not None and math.isfinite(target_epsilon) else None
    return Terms(unit=unit, target_epsilon=target, target_delta=target_delta)


def terms_body(terms: Terms) -> dict[str, Any]:
    """Terms as the entries hold them."""
    return {
        "unit": terms.unit,
        "neighbours": NEIGHBOURS,
        "target_epsilon": "inf" if terms.target_epsilon is None else repr(float(terms.target_epsilon)),
        "target_delta": repr(float(terms.target_delta)),
    }


def register_body(scope: DatasetScope, fold: Fold, terms: Terms, *, slots: int, actor: str) -> dict[str, Any]:
    """The first entry of a registered dataset.

    Raises:
        InvalidRequestError: the name has a ledger already, whatever became of its data; or delta is not below
            1 / slots, which would allow publishing a whole unit.
    """
    if fold.terms is not None:
        raise InvalidRequestError(
            f"dataset {scope.dataset_id} has a ledger already, and a budget is set once; take another dataset_id",
            field="dataset_id",
            constraint="never used before",
        )
    target = terms.target_epsilon
    if target is not None and not target > 0:
        raise InvalidRequestError("target_epsilon must be positive", field="target_epsilon", constraint="> 0")
    if slots < 1 or not 0 < terms.target_delta < 1 / slots:
        raise InvalidRequestError(
            f"target_delta {terms.target_delta:g} must be below 1 / {slots} units: such a promise would allow "
            "publishing a whole unit",
            field="target_delta",
            constraint="0 < target_delta < 1 / units",
        )
    return {"run_id": "", **terms_body(terms), "slots": slots, "actor": actor}


def raise_body(
    scope: DatasetScope, fold: Fold, terms: Terms, *, target_epsilon: float, reason: str, actor: str, request_id: str
) -> dict[str, Any]:
    """The entry that raises the target.

    Raises:
        InvalidRequestError: not larger than the target in force, not finite, or no reason given.
    """
    before = terms.target_epsilon
    if before is None:
        raise InvalidRequestError(
            f"dataset {scope.dataset_id} has no target to raise", field="target_epsilon", constraint="a finite target"
        )
    if not (math.isfinite(target_epsilon) and target_epsilon > before):
        raise InvalidRequestError(
            f"dataset {scope.dataset_id} has target epsilon {before:g}; a budget can only be raised, to a finite "
            f"epsilon, not to {target_epsilon:g}. Releases that were made cannot be taken back",
            field="target_epsilon",
            constraint=f"more than {before:g}, finite",
        )
    if not reason.strip() or len(reason) > MAX_REASON or not reason.isprintable():
        raise InvalidRequestError(
            f"reason must be one line of 1 to {MAX_REASON} characters: it stands in the ledger",
            field="reason",
            constraint=f"1 to {MAX_REASON} printable characters",
        )
    return {
        "run_id": "",
        "seq": fold.position + 1,
        "from_epsilon": repr(float(before)),
        "target_epsilon": repr(float(target_epsilon)),
        "reason": reason,
        "actor": actor,
        "request_id": request_id,
    }


def erase_body(fold: Fold, *, records: int, whole: bool, actor: str) -> dict[str, Any]:
    """The entry that notes how many records were erased; ``whole``: all that were left, for good."""
    return {"run_id": "", "seq": fold.position + 1, "records": records, "whole": whole, "actor": actor}


def refuse_other_terms(scope: DatasetScope, here: Terms | None, asked: Terms) -> None:
    """A run takes the dataset's terms.

    Raises:
        InvalidRequestError: saying both.
    """
    if here is None or here == asked:
        return

    def text(terms: Terms) -> str:
        target = "none" if terms.target_epsilon is None else f"{terms.target_epsilon:g}"
        return f"target epsilon {target}, delta {terms.target_delta:g}, unit {terms.unit}"

    raise InvalidRequestError(
        f"dataset {scope.dataset_id} has {text(here)}; this run asks for {text(asked)}. A budget belongs to the "
        "dataset: use its terms",
        field="dp_config",
        constraint="the dataset's terms",
    )


def refuse_wrong_voucher(scope: DatasetScope, fold: Fold, event: Event) -> None:
    """The server vouches for what it drew itself, from a registered dataset, and for nothing else.

    Raises:
        InvalidRequestError: a client claims the draw on a registered dataset, whose batches the server draws.
        ValueError: the server claims one that it cannot have made.
    """
    if not isinstance(event, SampledGaussian):
        return
    if event.vouched_by == "server" and fold.slots is None:
        raise ValueError("only registered datasets are drawn from by the server")
    if event.vouched_by == "client" and fold.slots is not None:
        raise InvalidRequestError(
            f"dataset {scope.dataset_id} is registered: the server draws its batches, so a client's draw is not "
            "counted as one. Train with forward_backward(dataset=...), or create the run with sampling='none'",
            field="dp_config.sampling",
            constraint="drawn by the server, or 'none'",
        )

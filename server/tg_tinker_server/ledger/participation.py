"""Counts in how many releases of a run each privacy unit took part, and what one more release adds.

Charging the growth of the largest count pays for every unit, because all releases of the run carry the same noise
and no unit is in more of them than that count says.
"""

from __future__ import annotations

from collections.abc import Sequence

from tg_tinker.errors import DPUnsupportedError, InvalidRequestError
from tg_tinker_server.dp.events import ParticipationGaussian
from tg_tinker_server.ledger.fold import RunUse
from tg_tinker_server.ledger.reservation import DatasetScope
from tg_tinker_server.store import ledger_rows as rows
from tg_tinker_server.store.database import Transaction

BY_ID = "ids"


def participate(
    tx: Transaction,
    scope: DatasetScope,
    run_id: str,
    event: ParticipationGaussian,
    *,
    use: RunUse,
    unit_macs: Sequence[bytes],
    naming: str,
    limit: int,
    retried: bool,
) -> ParticipationGaussian:
    """Count the units of one release; the event with how much it raised the largest count.

    A step that is charged again after a crash counts again, because nobody knows how far the first time got; such
    repetitions do not use up the units' own ``limit``.

    Args:
        naming: how the units got their names. A run has one way for its whole life: who goes by two names would be
            counted as two, and each name has turns of its own.

    Raises:
        InvalidRequestError: a unit would take part in more than ``limit`` steps, or units are named another way
            than before.
        DPUnsupportedError: the run was counted at another noise multiplier before, so one count cannot price both.
    """
    if use.noise_multiplier not in (None, event.noise_multiplier):
        raise DPUnsupportedError(
            f"this run counted participation at noise multiplier {use.noise_multiplier:g}, not at "
            f"{event.noise_multiplier:g}",
            feature="noise_multiplier",
            reason="one count prices one noise multiplier",
            alternative="start a new run on the dataset",
        )
    units = sorted(set(unit_macs))
    if units:
        _keep_to_one_naming(tx, scope, run_id, naming)
    before = rows.participations(tx, scope.tenant, scope.dataset_id, run_id, units)
    largest = 1 + max(before.values(), default=0)  # nobody's batch counts as somebody's: the first step is never free
    allowed = limit + use.retries + retried
    over = sum(1 for count in before.values() if count + 1 > allowed)
    if over:
        raise InvalidRequestError(
            f"{over} privacy units would take part in more than max_participation={limit} steps; leave them out of "
            "this batch, or end the run here",
            field="privacy_unit_ids",
            constraint=f"each unit in at most {limit} steps",
        )
    rows.count_participations(tx, scope.tenant, scope.dataset_id, run_id, units)
    return ParticipationGaussian(noise_multiplier=event.noise_multiplier, releases=max(0, largest - use.releases))


def _keep_to_one_naming(tx: Transaction, scope: DatasetScope, run_id: str, naming: str) -> None:
    kept = rows.unit_naming(tx, scope.tenant, scope.dataset_id, run_id)
    if kept is None:
        rows.keep_unit_naming(tx, scope.tenant, scope.dataset_id, run_id, naming)
    elif kept != naming:
        was = f"knows units by {kept}" if kept else "counted units without keeping how they were named"
        raise InvalidRequestError(
            f"this run {was}, and this batch by {naming}; the same unit would be counted under two names. Keep to "
            "one way throughout a run with max_participation, or start a new run on the dataset",
            field="privacy_unit_ids",
            constraint=f"as before, by {kept}" if kept else "a new run",
        )

"""Instrument 5: did the ledger charge at least what the audit's own runs cost?

The audit knows what it asked for. What that costs at least is computed by dp_accounting's optimistic loss
distribution, a lower bound on the true epsilon that shares no arithmetic with the ledger's gate. No chance is
involved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from tg_tinker.data import collate
from tg_tinker.privacy.accounting import loss_distribution
from tg_tinker.types import DPConfig
from tg_tinker_server.empirical import draws
from tg_tinker_server.empirical.bench import Bench
from tg_tinker_server.empirical.findings import Claim, Finding

_DATASET = "busy"
_NOISE_MULTIPLIER = 2.0
_TURNS = 6  # steps of the busiest unit
_BATCH = 8


def examine_charges(bench: Bench, claim: Claim, tell: Callable[[str], None] = lambda _: None) -> list[Finding]:
    """What three runs cost at least, over what was charged: chosen batches, drawn ones, and counted turns.

    Args:
        claim: of the distinguisher's run, whose batches were chosen.
    """
    tell("counted turns")
    _take_turns(bench)
    return [
        _finding("chosen batches", claim.epsilon, claim.delta, {(claim.noise_multiplier, 1.0): bench.settings.steps}),
        _charged(bench, "drawn batches", draws.DATASET, {(draws.NOISE_MULTIPLIER, draws.RATE): bench.settings.draws}),
        _charged(bench, "counted turns of a unit", _DATASET, {(_NOISE_MULTIPLIER, 1.0): _TURNS}),
    ]


def _take_turns(bench: Bench) -> None:
    """One unit takes part in every step, the others in one each."""
    dp = DPConfig(
        noise_multiplier=_NOISE_MULTIPLIER,
        target_epsilon=1e6,
        target_delta=bench.settings.delta,
        sampling="max_participation",
        max_participation=_TURNS,
        dataset_id=_DATASET,
    )
    client = bench.open(dp, batch_size=_BATCH, learning_rate=1e-3)
    for step in range(_TURNS):
        batch = collate(bench.records(_BATCH, 4))
        others = [f"unit-{step}-{i}" for i in range(_BATCH - 1)]
        client.forward_backward(batch, privacy_unit_ids=["busy", *others])
        client.optim_step().result()
    client.close()


def _charged(bench: Bench, name: str, dataset_id: str, history: Mapping[tuple[float, float], int]) -> Finding:
    ledger = bench.service.get_privacy_ledger(dataset_id)
    ledger.verify()
    return _finding(name, ledger.epsilon_spent, ledger.delta, history)


def _finding(name: str, charged: float, delta: float, history: Mapping[tuple[float, float], int]) -> Finding:
    least = least_epsilon(history, delta)
    return Finding(
        instrument="charges",
        name=f"{name}: true epsilon at least {least:.4g}, charged {charged:.4g}",
        figure=least / charged if charged > 0 else math.inf,
        threshold=1.0,
    )


def least_epsilon(history: Mapping[tuple[float, float], int], delta: float) -> float:
    """A lower bound on the true epsilon of (noise_multiplier, sample_rate) to how often; inf if there is none."""
    composed = loss_distribution(history, pessimistic=False)
    return math.inf if composed is None else float(composed.get_epsilon(delta))

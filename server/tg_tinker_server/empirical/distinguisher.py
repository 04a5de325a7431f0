"""Instrument 4: trains once with canaries, each in the data by a fair coin, and guesses the coins from the weights.

Shape suffixes: M canaries, P parameters.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tg_tinker import TrainingClient
from tg_tinker.data import collate
from tg_tinker.types import DPConfig
from tg_tinker_server.empirical.bench import Bench, Record, chunks
from tg_tinker_server.empirical.bounds import LowerBound, lower_bound
from tg_tinker_server.empirical.findings import Claim, Finding
from tg_tinker_server.empirical.planting import Planted

_DATASET = "canaries"
_BOUND = {"gradient": 4.0, "input": 0.1}
"""C. Records' own gradients must be longer than it, or they are weaker canaries than they could be."""
_LENGTH = 1000.0
"""Norm of a planted gradient over C: the clip takes it to C, and where nothing clips it stands out."""
_PER_CALL = 250
_TOKENS = {"gradient": 4, "input": 2}
"""Of a canary. A pair, what follows what, moves losses of other pairs least."""
_MOVE = {"gradient": 0.01, "input": 0.0005}
"""Of a weight by one step's noise. Losses follow weights to first order only while moves are small."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Distinguished:
    """What the ledger claims and what the guesses prove."""

    claim: Claim
    bound: LowerBound
    finding: Finding
    parameters: int


def distinguish(bench: Bench, *, smallest_p: float, tell: Callable[[str], None] = lambda _: None) -> Distinguished:
    """Train once and bound epsilon from below.

    Args:
        smallest_p: the claim is refuted by a p-value below it.
    """
    settings, watch = bench.settings, bench.watch
    watch.forget()
    canaries = bench.records(settings.canaries, _TOKENS[settings.mode])
    included_M = _coins(bench)
    client = _open(bench)
    parameters = client.get_info().trainable_parameters
    if settings.mode == "gradient":
        coordinates_M = _plant(bench, canaries, parameters)
    else:
        tell("losses before training")
        before_M = _losses(client, canaries)
    chosen = [record for record, coin in zip(canaries, included_M, strict=True) if coin]
    for step in range(settings.steps):
        tell(f"training, step {step + 1} of {settings.steps}")
        _step(client, chosen)
    if settings.mode == "gradient":
        released_P = sum((s.released_P for s in watch.steps), np.zeros(parameters))
        # A descent step moves weights against the gradient; the released sum has its sign.
        scores_M = released_P[coordinates_M]
    else:
        tell("losses after training")
        scores_M = before_M - _losses(client, canaries)
    client.close()
    watch.forget()
    claim = _claim(bench)
    bound = lower_bound(
        scores_M,
        included_M,
        claimed_epsilon=claim.epsilon,
        delta=settings.delta,
        confidence=settings.confidence,
    )
    finding = Finding(
        instrument="distinguisher",
        name=f"lower bound on epsilon at {settings.confidence:.0%} confidence, claimed {claim.epsilon:.4g}",
        figure=bound.epsilon,
        threshold=smallest_p,
        p_value=bound.p_value,
    )
    return Distinguished(claim=claim, bound=bound, finding=finding, parameters=parameters)


def _coins(bench: Bench) -> npt.NDArray[np.bool_]:
    count = bench.settings.canaries
    if bench.settings.seed is None:
        bits = np.unpackbits(np.frombuffer(secrets.token_bytes(-(-count // 8)), dtype=np.uint8))[:count]
        return bits.astype(np.bool_)
    return bench.rng.random(count) < 0.5


def _open(bench: Bench) -> TrainingClient:
    settings = bench.settings
    expected, bound = settings.canaries // 2, _BOUND[settings.mode]
    return bench.open(
        DPConfig(
            noise_multiplier="auto",
            max_grad_norm=bound,
            target_epsilon=settings.epsilon,
            target_delta=settings.delta,
            dataset_id=_DATASET,
        ),
        batch_size=expected,
        learning_rate=_MOVE[settings.mode] * expected / bound,
        max_steps=settings.steps,
    )


def _plant(bench: Bench, canaries: Sequence[Record], parameters: int) -> npt.NDArray[np.int64]:
    """Give every canary a gradient on a coordinate of its own, which is C there after the clip."""
    coordinates_M = bench.rng.choice(parameters, size=len(canaries), replace=len(canaries) > parameters)
    for record, coordinate in zip(canaries, coordinates_M, strict=True):
        bench.watch.plant(record, Planted(coordinate=int(coordinate), value=_LENGTH * _BOUND["gradient"]))
    return coordinates_M.astype(np.int64)


def _step(client: TrainingClient, chosen: Sequence[Record]) -> None:
    """One step on every canary that is in the data."""
    for part in chunks(chosen, _PER_CALL):
        client.forward_backward(collate(part))
    client.optim_step().result()


def _losses(client: TrainingClient, canaries: Sequence[Record]) -> npt.NDArray[np.float64]:
    """Each canary's own loss, in nats per token [M]."""
    client.eval()
    losses: list[float] = []
    for part in chunks(canaries, 100):  # below the queue's limit
        waiting = [client.forward_backward(collate([record])) for record in part]
        losses += [w.result().loss for w in waiting]
    client.train()
    return np.array(losses)


def _claim(bench: Bench) -> Claim:
    """What the ledger charged, after a check that its chain is intact and every release was paid for."""
    ledger = bench.service.get_privacy_ledger(_DATASET)
    ledger.verify()
    events = {charge.body["event"]["noise_multiplier"] for charge in ledger.charges}
    assert len(events) == 1, "one run has one noise multiplier"
    return Claim(
        epsilon=ledger.epsilon_spent,
        delta=ledger.delta,
        noise_multiplier=float(events.pop()),
        steps=len(ledger.charges),
        dataset_id=_DATASET,
        ledger_head=ledger.head.hex(),
    )

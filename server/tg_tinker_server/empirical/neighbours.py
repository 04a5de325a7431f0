"""Instrument 1: how far does the clipped sum move when one privacy unit is left out?

Pairs of neighbouring batches, chosen to be as bad as we can think of, go through the service without noise (a run
that was created for it, whose epsilon is infinite), from the same weights. The weights tell both sums. No chance is
involved: a sum that moves by more than C contradicts the claim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from tg_tinker import TrainingClient
from tg_tinker.data import collate
from tg_tinker.errors import InvalidRequestError, TGTinkerError
from tg_tinker.types import DPConfig
from tg_tinker_server.dp.mechanism import ROUNDING_ROOM
from tg_tinker_server.empirical.bench import Bench, Record
from tg_tinker_server.empirical.findings import Finding
from tg_tinker_server.empirical.planting import Planted
from tg_tinker_server.empirical.watching import Floats

MOST = 1.0 + ROUNDING_ROOM
"""Largest distance over C that the noise covers."""

_BATCH = 8
_ORDINARY = 12  # tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One forward_backward: records, and whose they are."""

    records: Sequence[Record]
    units: Sequence[str] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two logical batches that differ by one unit.

    Attributes:
        refusable: the service may refuse the batch that has the unit, which is the safest answer.
        planted: gradients of some records.
    """

    name: str
    with_unit: Sequence[Call]
    without: Sequence[Call]
    refusable: bool = False
    planted: dict[Record, Planted] = field(default_factory=dict)


def probe_neighbours(bench: Bench, tell: Callable[[str], None] = lambda _: None) -> list[Finding]:
    """Every pair at a bound below all norms and at one above them, then pairs of a run that merges units."""
    low = bench.settings.bounds[0]
    short_norm = natural_norm(bench, low)
    findings = []
    for bound, merge in ((low, False), (1.5 * short_norm, False), (low, True)):
        prober = Prober(bench, bound, merge=merge)
        for pair in merging_pairs(bench, bound) if merge else pairs(bench, bound):
            tell(pair.name)
            findings.append(prober.measure(pair))
        prober.client.close()
    return findings


class Prober:
    """One run without noise, put back to the same weights before every measurement."""

    def __init__(self, bench: Bench, bound: float, *, merge: bool) -> None:
        self._bench = bench
        self._bound = bound
        self._merge = merge
        self.client = _open(bench, bound, merge=merge)
        # An adapter is born with one half zero, which hides the other half's gradients: take two steps first. They
        # carry noise, because the service opens no checkpoint of what was trained without.
        for _ in range(2):
            self._sum([Call(records=bench.records(_BATCH, _ORDINARY), units=None)], noise=True)
        self._start = self.client.save_state(include_optimizer=False).artifact_id

    def measure(self, pair: Pair) -> Finding:
        """Distance of the two sums over C."""
        watch = self._bench.watch
        watch.forget()
        for record, gradient in pair.planted.items():
            watch.plant(record, gradient)
        try:
            distance, note = self._distance(pair)
        finally:
            watch.forget()
        merged = ", units merged" if self._merge else ""
        return Finding(
            instrument="neighbours",
            name=f"{pair.name} (C = {self._bound:.3g}{merged})",
            figure=distance,
            threshold=MOST,
            note=note,
        )

    def _distance(self, pair: Pair) -> tuple[float, str]:
        """Over C, and the service's words where it refused."""
        self.client.load_state(self._start)
        try:
            with_P = self._sum(pair.with_unit)
        except InvalidRequestError as e:
            refused = pair.refusable and e.field == "privacy_unit_ids"
            return (0.0 if refused else math.inf), f"refused: {e.message}"
        except TGTinkerError as e:
            return math.inf, f"failed: {e.message}"
        self.client.load_state(self._start)
        return float(np.linalg.norm(with_P - self._sum(pair.without))) / self._bound, ""

    def _sum(self, calls: Sequence[Call], *, noise: bool = False) -> Floats:
        for call in calls:
            self.client.forward_backward(collate(call.records), privacy_unit_ids=call.units).result()
        self.client.optim_step(apply_dp_noise=noise).result()
        return self._bench.watch.steps[-1].released_P


def _open(bench: Bench, bound: float, *, merge: bool) -> TrainingClient:
    dp = DPConfig(
        noise_multiplier=0.1,
        max_grad_norm=bound,
        target_epsilon=None,
        allow_unnoised_steps=True,
        merge_units=merge,
        dataset_id=f"neighbours-{bound:.6g}-{merge}",
    )
    return bench.open(dp, batch_size=_BATCH, learning_rate=1.0)


def natural_norm(bench: Bench, bound: float) -> float:
    """Norm of a short record's own gradient at fresh weights, as the owner's diagnostics tell it."""
    client = bench.open(
        DPConfig(max_grad_norm=bound, target_epsilon=None, allow_unnoised_steps=True, dataset_id="norms"),
        batch_size=_BATCH,
        learning_rate=1.0,
    )
    client.forward_backward(collate(bench.records(_BATCH, 2))).result()
    metrics = client.optim_step(apply_dp_noise=False).result().dp_metrics
    client.close()
    assert metrics is not None
    return float(metrics.grad_norm_before_clip)


def _ids(prefix: str, count: int) -> list[str]:
    return [f"{prefix}-{i}" for i in range(count)]


def pairs(bench: Bench, bound: float) -> Iterator[Pair]:
    """Pairs for a run in which each unit comes in one call."""
    base, ids = bench.records(_BATCH, _ORDINARY), _ids("base", _BATCH)
    (unit,) = bench.records(1, _ORDINARY)
    without = [Call(records=base, units=ids)]

    def plus(records: Sequence[Record]) -> list[Call]:
        return [Call(records=[*base, *records], units=[*ids, *["unit"] * len(records)])]

    yield Pair(name="ordinary record", with_unit=plus([unit]), without=without)

    long = bench.records(1, 256 + 1)[0]
    short = bench.records(1, 2) * (2 * _BATCH)
    yield Pair(
        name="long canary beside short records",
        with_unit=[Call(records=[*short, long], units=[*_ids("short", len(short)), "unit"])],
        without=[Call(records=short, units=_ids("short", len(short)))],
    )
    for name, value in (
        ("gradient on the boundary", bound),
        ("gradient just above the boundary", bound * (1 + 1e-4)),
        ("huge loss weight: gradient of 1e6 C", 1e6 * bound),
        ("huge loss weight: gradient of 1e18 C", 1e18 * bound),
        ("gradient that is not a number", math.nan),
        ("gradient that is infinite", math.inf),
    ):
        planted = {unit: Planted(coordinate=7, value=value)}
        yield Pair(name=name, with_unit=plus([unit]), without=without, planted=planted)
    yield Pair(
        name="giant against the rest of the batch",
        with_unit=plus([unit]),
        without=without,
        planted={
            unit: Planted(coordinate=7, value=1e3 * bound),
            **{record: Planted(coordinate=7, value=-10 * bound) for record in base},
        },
    )
    several = bench.records(4, _ORDINARY)
    yield Pair(
        name="unit of four records, each on the boundary",
        with_unit=plus(several),
        without=without,
        planted={record: Planted(coordinate=7, value=bound) for record in several},
    )
    many = bench.records(40, _ORDINARY)
    yield Pair(name="unit of forty records", with_unit=plus(many), without=without)
    yield Pair(name="one record forty times in a unit", with_unit=plus([unit] * 40), without=without)
    (other,) = bench.records(1, _ORDINARY)
    second = Call(records=[other], units=["other"])
    again = Call(records=[other, unit], units=["other", "unit"])
    yield Pair(
        name="unit in two calls",
        with_unit=[*plus([unit]), again],
        without=[*without, second],
        refusable=True,
        planted={unit: Planted(coordinate=7, value=bound)},
    )
    unnamed = Call(records=[*base, unit], units=None)
    yield Pair(
        name="unnamed record sent twice",
        with_unit=[unnamed, Call(records=[other, unit], units=None)],
        without=[Call(records=base, units=None), Call(records=[other], units=None)],
        refusable=True,
        planted={unit: Planted(coordinate=7, value=bound)},
    )


def merging_pairs(bench: Bench, bound: float) -> Iterator[Pair]:
    """Pairs for a run in which a unit may come in several calls and is clipped once."""
    base, ids = bench.records(_BATCH, _ORDINARY), _ids("base", _BATCH)
    unit, other = bench.records(2, _ORDINARY)
    first = Call(records=base, units=ids)
    second = Call(records=[other], units=["other"])
    with_unit = [
        Call(records=[*base, unit], units=[*ids, "unit"]),
        Call(records=[other, unit], units=["other", "unit"]),
        Call(records=[unit], units=["unit"]),
    ]
    for name, value in (("unit in three calls", bound), ("giant unit in three calls", 1e6 * bound)):
        planted = {unit: Planted(coordinate=7, value=value)}
        yield Pair(name=name, with_unit=with_unit, without=[first, second], planted=planted)

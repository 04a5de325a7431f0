"""Instrument 3: does the server draw batches from a registered dataset as its ledger says it does?

A run on a dataset of one record a unit; the engine is watched for whose records come at each step. Every test counts
something that is binomial under the claim, whatever the count's size: no approximation enters a p-value.

Shape suffixes: S steps, U units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from tg_tinker_server.empirical.bench import Bench
from tg_tinker_server.empirical.findings import Finding

Bools = npt.NDArray[np.bool_]

DATASET = "drawn"
UNITS = 256
EXPECTED = 32
RATE = EXPECTED / UNITS
NOISE_MULTIPLIER = 2.0
TESTS = 4
"""How many p-values come out."""

_TOKENS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """A count, its mean under the claim, and the probability of one so far from it."""

    name: str
    count: int
    mean: float
    p_value: float


def examine_draws(bench: Bench, *, smallest_p: float, tell: Callable[[str], None] = lambda _: None) -> list[Finding]:
    """Let the server draw, and test what it drew.

    Args:
        smallest_p: p-values below it are alarms.
    """
    tell(f"{bench.settings.draws} draws of a batch")
    counts = examine(_drawn(bench), RATE)
    assert len(counts) == TESTS
    return [
        Finding(
            instrument="draws",
            name=f"{test.name}, over what the declared rate makes of it",
            figure=test.count / test.mean,
            threshold=smallest_p,
            p_value=test.p_value,
        )
        for test in counts
    ]


def _drawn(bench: Bench) -> Bools:
    """Who came in which step [S, U]."""
    bench.watch.forget()
    records = [{"input_ids": list(record)} for record in bench.records(UNITS, _TOKENS)]
    dataset = bench.service.create_dataset(DATASET, records, target_epsilon=1e6, target_delta=bench.settings.delta)
    client = bench.open(
        dataset.dp_config(noise_multiplier=NOISE_MULTIPLIER), batch_size=EXPECTED, learning_rate=1e-3 * EXPECTED
    )
    for _ in range(bench.settings.draws):
        client.forward_backward(dataset=dataset)
        client.optim_step().result()
    client.close()
    drawn_SU = matrix([step.units for step in bench.watch.steps])
    bench.watch.forget()
    return drawn_SU


def matrix(steps: Sequence[Sequence[str]]) -> Bools:
    """Names of units drawn at each step, as a matrix. Who never came has a column, too, at the end."""
    names = {name: column for column, name in enumerate(dict.fromkeys(n for step in steps for n in step))}
    drawn_SU = np.zeros((len(steps), max(UNITS, len(names))), dtype=np.bool_)
    for row, step in enumerate(steps):
        drawn_SU[row, [names[n] for n in step]] = True
    return drawn_SU


def examine(drawn_SU: Bools, rate: float) -> list[Count]:
    """Every test of one run's draws, an even number of them."""
    steps, units = drawn_SU.shape
    again = drawn_SU[0::2] & drawn_SU[1::2]
    return [
        _count("units drawn", int(drawn_SU.sum()), steps * units, rate),
        # A fixed batch comes again too often, and the disjoint batches of an epoch too rarely.
        _count("units in both of two neighbouring draws", int(again.sum()), again.size, rate * rate),
        # Of a fixed size all are in the middle; of draws that are all or nothing, none is.
        _in_the_middle("draws of a middling size", drawn_SU.sum(axis=1), units, rate),
        # Who is drawn at another rate than the rest lies outside.
        _in_the_middle("units drawn middling often", drawn_SU.sum(axis=0), steps, rate),
    ]


def _count(name: str, count: int, trials: int, chance: float) -> Count:
    law = stats.binom(trials, chance)
    p = min(1.0, 2.0 * min(float(law.cdf(count)), float(law.sf(count - 1))))
    return Count(name=name, count=count, mean=trials * chance, p_value=p)


def _in_the_middle(name: str, sums: npt.NDArray[np.int64], trials: int, rate: float) -> Count:
    """How many of independent binomial sums lie within half a standard deviation of their mean."""
    law = stats.binom(trials, rate)
    half = 0.5 * float(law.std())
    low, high = math.ceil(float(law.mean()) - half), math.floor(float(law.mean()) + half)
    chance = float(law.cdf(high) - law.cdf(low - 1))
    return _count(name, int(np.sum((sums >= low) & (sums <= high))), len(sums), chance)

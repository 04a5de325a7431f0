"""Never below the truth: the gate and PRV on a grid of noise, rate, steps and delta, against an upper bound on it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from dp_accounting.pld import privacy_loss_distribution

from tests.golden.epsilon_grid import (
    DELTAS,
    RATES,
    SIGMAS,
    STEPS,
    TABLE,
    Point,
    gate_ratio,
    gaussian_epsilon,
    points_at,
    reference,
    table,
    whole_grid,
)


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    """The table of the whole grid, as written by ``python -m tests.golden.epsilon_grid``."""
    table: dict[str, Any] = json.loads(TABLE.read_text())
    return table


# Every noise, rate and number of steps at least once, in places that differ; then the corners.
SAMPLE = [(SIGMAS[i % len(SIGMAS)], RATES[(3 * i) % len(RATES)], STEPS[(5 * i) % len(STEPS)]) for i in range(10)]
CORNERS = [
    (0.1, 1e-9, 1_000_000),  # tiny rate, hardly any noise, many steps
    (0.1, 1.0, 10_000),
    (0.1, 0.999999, 100),
    (0.5, 1e-5, 1_000_000),
    (1.0, 1 - 1e-12, 1000),  # a rate so near 1 that 1 - q is rounding error
    (1.0, 1 - 1e-12, 1),
    (0.3, 1e-7, 1000),  # where Opacus's PRV lay 0.15 below at delta 1e-12, by rounding
    (20.0, 1e-9, 1),  # nothing to see
    (20.0, 0.9, 1_000_000),
    (8.0, 0.5, 1_000_000),  # where the gate comes closest
]


def check(points: list[Point]) -> None:
    for p in points:
        assert p.gate >= p.reference, p
        if math.isfinite(p.prv):
            assert p.prv >= p.reference - p.overstated, p


@pytest.mark.parametrize(("sigma", "rate", "steps"), [*SAMPLE, *CORNERS])
def test_no_epsilon_is_below_the_reference(sigma: float, rate: float, steps: int) -> None:
    check(list(points_at(sigma, rate, steps, (1e-5, 1e-12))))


def test_the_sample_covers_the_grid() -> None:
    for i, axis in enumerate((SIGMAS, RATES, STEPS)):
        assert {place[i] for place in SAMPLE} == set(axis)


@pytest.mark.parametrize(("sigma", "rate", "steps"), [(1.0, 0.01, 1000), (4.0, 0.1, 2000)])
def test_the_reference_is_dp_accountings_own_epsilon_where_that_is_not_noise(
    sigma: float, rate: float, steps: int
) -> None:
    theirs = privacy_loss_distribution.from_gaussian_mechanism(
        sigma, sampling_prob=rate, value_discretization_interval=1e-4
    ).self_compose(steps)
    for delta, ours in zip((1e-3, 1e-6), reference(sigma, rate, steps, (1e-3, 1e-6)), strict=True):
        assert ours == pytest.approx(theirs.get_epsilon_for_delta(delta), rel=2e-3)


@pytest.mark.parametrize("steps", [1, 1_000_000])
def test_the_reference_at_a_rate_next_to_1_is_the_exact_gaussian_from_above(steps: int) -> None:
    found = reference(20.0, 1 - 1e-12, steps, DELTAS)
    for delta, ours in zip(DELTAS, found, strict=True):
        exact = gaussian_epsilon(20.0 / math.sqrt(steps), delta)
        assert exact * (1 - 1e-9) <= ours <= exact * 1.01 + 1e-5


def test_the_kept_table_holds_what_it_must_show(kept: dict[str, Any]) -> None:
    assert kept["gate"]["points"] >= 2000
    assert kept["gate"]["below_reference"] == 0
    assert kept["prv"]["below_truth"] == 0
    assert len(kept["rows"]) == len(SIGMAS) * len(RATES)


def test_the_closest_rows_of_the_kept_table_come_out_again(kept: dict[str, Any]) -> None:
    closest = sorted((row for row in kept["rows"] if row["smallest_ratio"]), key=lambda row: row["smallest_ratio"])
    for row in closest[:3]:
        at = row["at"]
        (p,) = points_at(row["noise_multiplier"], row["sample_rate"], at["steps"], [at["delta"]])
        assert p.gate == pytest.approx(at["gate"], rel=1e-9)
        assert gate_ratio(p) == pytest.approx(row["smallest_ratio"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_epsilon_is_below_the_reference_on_the_whole_grid(kept: dict[str, Any]) -> None:
    points = list(whole_grid())
    check(points)
    found = table(points)
    assert found["gate"]["points"] == kept["gate"]["points"]
    assert found["gate"]["smallest_ratio"] == pytest.approx(kept["gate"]["smallest_ratio"], rel=1e-4)

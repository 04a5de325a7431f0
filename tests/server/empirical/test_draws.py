"""Tests of the server's draws: Poisson draws pass at the stated rate, and other ways to make batches fail one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from tests.audit.faults import FAULTS, plant
from tg_tinker_server.empirical.draws import RATE, UNITS, Count, examine, matrix
from tg_tinker_server.service import draws

STEPS = 32
ALARM = 2e-5  # of an audit, as it splits its false-alarm rate


def drawn(draw: Callable[[], np.ndarray], steps: int = STEPS) -> np.ndarray:
    return matrix([[f"slot-{s}" for s in draw()] for _ in range(steps)])


def of_the_server(units: int = UNITS, rate: float = RATE) -> np.ndarray:
    return drawn(lambda: draws.poisson_draw(units, rate))


def found(drawn_SU: np.ndarray) -> dict[str, Count]:
    return {test.name: test for test in examine(drawn_SU, RATE)}


def test_p_values_of_honest_draws_are_not_too_small_too_often() -> None:
    rng = np.random.default_rng(0)
    p = np.array([[t.p_value for t in examine(rng.random((STEPS, UNITS)) < RATE, RATE)] for _ in range(300)])
    for level in (0.1, 0.01):
        most = stats.binom.ppf(1 - 1e-7, 300, level)
        assert (np.sum(p < level, axis=0) <= most).all()
    assert p.min() > 1e-6
    assert (np.sum(p < 0.25, axis=0) > 20).all(), "they can be small"


def test_the_services_own_draws_pass() -> None:
    assert min(t.p_value for t in found(of_the_server()).values()) > 1e-8


@pytest.mark.parametrize(
    ("fault", "test"),
    [
        ("drawn at twice the rate", "units drawn"),
        ("drawn at 1.25 times the rate", "units drawn"),
        ("the same units in every draw", "units in both of two neighbouring draws"),
        ("shuffled epochs for Poisson draws", "units in both of two neighbouring draws"),
        ("draws of a fixed size", "draws of a middling size"),
        ("half of the units drawn twice as often, the others never", "units drawn middling often"),
    ],
)
def test_draws_that_are_not_as_declared_fail_the_test_made_for_it(fault: str, test: str) -> None:
    assert fault in FAULTS
    with plant(fault):
        assert found(of_the_server())[test].p_value < ALARM


def test_batches_that_are_all_or_nothing_are_noticed() -> None:
    rng = np.random.default_rng(1)
    taken = np.repeat(rng.random((STEPS, 1)) < RATE, UNITS, axis=1)
    assert found(taken)["draws of a middling size"].p_value < ALARM


def test_who_never_came_is_counted_and_who_came_twice_in_a_step_came_once() -> None:
    drawn_SU = matrix([["b", "a", "b"], [], ["a"]])
    assert drawn_SU.shape == (3, UNITS)
    assert drawn_SU.sum(axis=0)[:3].tolist() == [1, 2, 0]
    assert drawn_SU.sum(axis=1).tolist() == [2, 0, 1]


def test_a_rate_a_quarter_too_high_is_all_but_always_seen() -> None:
    rng = np.random.default_rng(2)
    seen = [found(rng.random((STEPS, UNITS)) < 1.25 * RATE)["units drawn"].p_value < ALARM for _ in range(60)]
    assert np.mean(seen) > 0.95


def test_a_count_has_twice_the_probability_of_its_rarer_tail() -> None:
    for count in (0, 3, 4, 5, 12):
        drawn_SU = np.arange(STEPS)[None, :] < np.array([count, 0])[:, None]
        tails = [stats.binomtest(count, 2 * STEPS, RATE, alternative=side).pvalue for side in ("less", "greater")]
        assert found(drawn_SU)["units drawn"].p_value == pytest.approx(min(1.0, 2 * min(tails)))

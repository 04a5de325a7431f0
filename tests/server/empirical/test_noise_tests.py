"""Tests of the noise: honest noise passes them at the stated rate, and every way of being wrong fails one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from tg_tinker_server.dp.rng import SecureNormal
from tg_tinker_server.empirical import noise_tests
from tg_tinker_server.empirical.noise_tests import anderson_darling, anderson_darling_tail, examine

SHAPE = (8, 20_000)


def noise(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=SHAPE)


def signal() -> np.ndarray:
    towards = np.zeros(SHAPE)
    towards[:, 7] = 8.0
    return towards


def p_values(z: np.ndarray, sums: np.ndarray | None = None) -> dict[str, float]:
    return {t.name: t.p_value for t in examine(2.0 * z, 2.0 * (signal() if sums is None else sums), stddev=2.0)}


def test_the_services_own_noise_passes() -> None:
    z = SecureNormal().normals(SHAPE[0] * SHAPE[1]).reshape(SHAPE)
    assert min(p_values(z).values()) > 1e-6


def test_p_values_of_honest_noise_are_not_too_small_too_often() -> None:
    """Each statistic in 60 samples: the smallest of them has to be rare as its p-value says."""
    rng = np.random.default_rng(0)
    found = [p_values(rng.normal(size=(4, 12_000)), signal()[:4, :12_000]) for _ in range(60)]
    for name in found[0]:
        values = np.array([one[name] for one in found])
        assert np.sum(values < 0.1) <= stats.binom.ppf(1 - 1e-5, 60, 0.1), name
        assert values.min() > 1e-7, name


def test_the_scale_is_held_against_what_was_paid_for_and_the_room_above_it() -> None:
    """At either end of what is allowed a chi-square that is exactly its mean is as likely above as below."""
    for size, name in ((1.0, "less noise than paid for"), (1.001, "more noise than paid for")):
        (found,) = (t for t in noise_tests.scale(np.full(SHAPE, size)) if t.name == name)
        assert found.p_value == pytest.approx(0.5, abs=0.01)
        assert found.figure == pytest.approx(size)


def test_two_sided_p_values_are_uniform() -> None:
    rng = np.random.default_rng(1)
    for name in ("mean", "times the clipped sum is in it"):
        values = [p_values(rng.normal(size=(2, 1000)), signal()[:2, :1000])[name] for _ in range(200)]
        assert stats.kstest(values, "uniform").pvalue > 1e-4


ALTERED = {
    "none": (lambda z, rng: 0 * z, "less noise than paid for"),
    "one per cent less": (lambda z, rng: 0.99 * z, "less noise than paid for"),
    "half": (lambda z, rng: 0.5 * z, "less noise than paid for"),
    "two per cent more": (lambda z, rng: 1.02 * z, "more noise than paid for"),
    "shifted": (lambda z, rng: z + 0.02, "mean"),
    "uniform": (lambda z, rng: rng.uniform(-(3**0.5), 3**0.5, SHAPE), "Kolmogorov-Smirnov"),
    "Laplace": (lambda z, rng: rng.laplace(0, 0.5**0.5, SHAPE), "Anderson-Darling"),
    "cut at 2": (lambda z, rng: np.clip(z, -2, 2), "Anderson-Darling"),
    "the same in two steps": (lambda z, rng: np.concatenate([z[:7], z[:1]]), "reused between steps"),
    "its opposite in another step": (lambda z, rng: np.concatenate([z[:7], -z[:1]]), "reused between steps"),
    "a tenth of another step": (lambda z, rng: z + 0.1 * np.roll(z, 1, axis=0), "reused between steps"),
    "repeated within a step": (lambda z, rng: np.tile(z[:, :5000], 4), "correlated within a step"),
    "moved and used again": (
        lambda z, rng: np.concatenate([z[:1], np.roll(z[:1], 1234), z[2:]]),
        "reused at a shift",
    ),
}


@pytest.mark.parametrize("how", ALTERED)
def test_noise_that_is_not_as_claimed_fails_the_test_made_for_it(how: str) -> None:
    rng = np.random.default_rng(3)
    alter, name = ALTERED[how]
    assert p_values(alter(noise(rng), rng))[name] < 1e-6


def test_a_sum_that_goes_in_twice_or_not_at_all_is_noticed() -> None:
    rng = np.random.default_rng(4)
    for left_over in (1.0, -1.0):
        (found,) = (
            t
            for t in examine(noise(rng) + left_over * signal(), signal(), stddev=1.0)
            if t.name == "times the clipped sum is in it"
        )
        assert found.figure == pytest.approx(1 + left_over, abs=0.3)
        assert found.p_value < 1e-6


def test_noise_that_does_not_follow_the_bound_is_noticed() -> None:
    rng = np.random.default_rng(5)
    assert noise_tests.follows_bound(noise(rng), noise(rng)).p_value > 1e-4
    assert noise_tests.follows_bound(noise(rng), 1.02 * noise(rng)).p_value < 1e-6
    assert noise_tests.follows_bound(noise(rng), np.zeros(SHAPE)).p_value == 0.0


def test_noise_of_one_run_that_comes_again_in_another_is_noticed() -> None:
    rng = np.random.default_rng(8)
    first, second = noise(rng), noise(rng)
    assert noise_tests.between_runs(first, second).p_value > 1e-4
    second[5] = -3.0 * first[2]
    assert noise_tests.between_runs(first, second).figure == pytest.approx(1.0)
    assert noise_tests.between_runs(first, second).p_value < 1e-300
    assert noise_tests.between_runs(first, np.zeros(SHAPE)).p_value == 0.0


def test_p_values_between_runs_are_those_of_the_largest_of_many() -> None:
    rng = np.random.default_rng(9)
    values = [
        noise_tests.between_runs(rng.normal(size=(4, 2000)), rng.normal(size=(4, 2000))).p_value for _ in range(200)
    ]
    assert 5 < sum(p < 0.1 for p in values) <= stats.binom.ppf(1 - 1e-6, 200, 0.1)


def test_the_statistic_of_anderson_and_darling_is_that_of_its_definition() -> None:
    """The integral of (F_n - F)^2 / (F (1 - F)) dF, computed piece by piece for a small sample."""
    z = np.sort(np.random.default_rng(6).normal(size=12))
    grid = np.concatenate([[0.0], stats.norm.cdf(z), [1.0]])
    n, total = len(z), 0.0
    for i in range(n + 1):  # F_n = i / n between the i-th and the next: an antiderivative in u
        a, b, k = grid[i], grid[i + 1], i / n

        def antiderivative(u: float, k: float = k) -> float:
            left = 0.0 if k == 0 else k * k * np.log(u)
            right = 0.0 if k == 1 else -((1 - k) ** 2) * np.log(1 - u)
            return float(left + right - u)

        total += n * (antiderivative(b) - antiderivative(a))
    assert anderson_darling(z) == pytest.approx(total, rel=1e-9)


def test_the_tail_of_anderson_and_darling_is_that_of_a_simulation_and_of_the_tables() -> None:
    for quantile, tail in ((1.933, 0.10), (2.492, 0.05), (3.070, 0.025), (3.857, 0.01)):  # Stephens 1974, case 0
        assert anderson_darling_tail(quantile) == pytest.approx(tail, rel=0.03)
    rng = np.random.default_rng(7)
    found = np.array([anderson_darling(np.sort(rng.normal(size=200))) for _ in range(4000)])
    for a_squared in (0.5, 1.0, 2.0):
        share = float(np.mean(found > a_squared))
        assert share == pytest.approx(anderson_darling_tail(a_squared), abs=4 * 0.5 / 4000**0.5)
    assert anderson_darling_tail(0.0) == 1.0
    tails = [anderson_darling_tail(z) for z in np.linspace(0.05, 120, 500)]
    assert all(a >= b - 1e-5 for a, b in itertools.pairwise(tails))

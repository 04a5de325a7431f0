"""Every strategy against its formula in plain NumPy; what poison can and cannot do; frozen factors stay."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tg_tinker.federated.jobs import make_job
from tg_tinker.errors import FederationRefusedError
from tg_tinker.federated.aggregation import Moments, check_robust, checked_update, combined, update_norm
from tg_tinker.federated.job import Strategy
from tg_tinker.federated.updates import flatten, trained_names

pytest.importorskip("flwr")
NAMES = {"q.lora_A.weight": (2, 3), "q.lora_B.weight": (4, 2), "q.bias": (4,)}


def weights(seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return {n: (scale * rng.normal(size=s)).astype(np.float32) for n, s in NAMES.items()}


def update(seed, scale=0.1, factor=None):
    full = weights(seed, scale)
    return {n: full[n] for n in trained_names(full, factor)}


def step(name, updates, *, moments=None, round_=1, factor=None, **settings):
    before = weights()
    after, moments = combined(
        Strategy(name=name, **settings), before, updates, factor=factor, round_=round_, moments=moments or Moments()
    )
    change = {n: after[n].astype(np.float64) - before[n] for n in trained_names(before, factor)}
    return change, moments


def stacked(updates):
    return np.stack([np.concatenate([u[n].ravel().astype(np.float64) for n in sorted(u)]) for u in updates])


def vector(change):
    return np.concatenate([change[n].ravel() for n in sorted(change)])


def krum_scores(rows, malicious):
    """Blanchard et al. 2017, word for word: distances to the n - f - 2 nearest others."""
    n = len(rows)
    scores = []
    for i in range(n):
        others = sorted(sum((x - y) ** 2 for x, y in zip(rows[i], rows[j], strict=True)) for j in range(n) if j != i)
        scores.append(sum(others[: n - malicious - 2]))
    return np.argsort(scores, kind="stable")


UPDATES = [update(seed) for seed in range(1, 8)]


@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_fedavg_and_fedprox_apply_the_plain_mean(name):
    change, _ = step(name, UPDATES, proximal_mu=0.1)
    np.testing.assert_allclose(vector(change), stacked(UPDATES).mean(axis=0), atol=2e-7)


def test_the_median_is_taken_coordinate_by_coordinate():
    change, _ = step("fedmedian", UPDATES)
    rows = stacked(UPDATES)
    np.testing.assert_allclose(vector(change), np.sort(rows, axis=0)[3], atol=2e-7)


@pytest.mark.parametrize(("fraction", "cut"), [(0.0, 0), (0.15, 1), (0.3, 2), (0.45, 3)])
def test_the_trimmed_mean_cuts_each_end_of_each_coordinate(fraction, cut):
    change, _ = step("fedtrimmedavg", UPDATES, trimmed_fraction=fraction)
    rows = np.sort(stacked(UPDATES), axis=0)
    np.testing.assert_allclose(vector(change), rows[cut : 7 - cut].mean(axis=0), atol=2e-7)


@pytest.mark.parametrize("malicious", [0, 1, 2])
def test_krum_takes_the_update_with_the_nearest_neighbours_and_multikrum_the_mean_of_several(malicious):
    rows = stacked(UPDATES)
    order = krum_scores(rows, malicious)
    change, _ = step("krum", UPDATES, num_malicious=malicious)
    np.testing.assert_allclose(vector(change), rows[order[0]], atol=2e-7)
    change, _ = step("multikrum", UPDATES, num_malicious=malicious)
    np.testing.assert_allclose(vector(change), rows[order[: 7 - malicious - 2]].mean(axis=0), atol=2e-7)


@pytest.mark.parametrize("name", ["fedadam", "fedyogi"])
def test_adaptive_strategies_follow_reddi_et_al_over_rounds(name):
    beta1, beta2, tau, eta = 0.8, 0.95, 0.01, 0.5
    m = v = 0.0
    moments = Moments()
    for round_ in (1, 2, 3):
        updates = [update(10 * round_ + k) for k in range(3)]
        change, moments = step(
            name,
            updates,
            round_=round_,
            moments=moments,
            betas=(beta1, beta2),
            tau=tau,
            server_learning_rate=eta,
        )
        delta = stacked(updates).mean(axis=0)
        m = beta1 * m + (1 - beta1) * delta
        if name == "fedadam":
            v = beta2 * v + (1 - beta2) * delta**2
            rate = eta * np.sqrt(1 - beta2 ** (round_ + 1)) / (1 - beta1 ** (round_ + 1))
        else:
            v = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
            rate = eta
        np.testing.assert_allclose(vector(change), rate * m / (np.sqrt(v) + tau), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(vector(moments.m), m, rtol=1e-12)
        np.testing.assert_allclose(vector(moments.v), v, rtol=1e-12)


@pytest.mark.parametrize("name", ["fedavg", "fedadam", "fedyogi", "fedmedian", "fedtrimmedavg", "krum", "multikrum"])
@pytest.mark.parametrize("factor", ["a", "b"])
def test_a_frozen_factor_comes_out_bit_for_bit(name, factor):
    before = weights()
    updates = [update(seed, factor=factor) for seed in range(1, 6)]
    after, moments = combined(
        Strategy(name=name), before, updates, factor=factor, round_=1, moments=Moments(m={}, v={})
    )
    frozen = f"q.lora_{factor.upper()}.weight"
    trained = set(NAMES) - {frozen}
    assert after[frozen].tobytes() == before[frozen].tobytes()
    assert all(after[n].tobytes() != before[n].tobytes() for n in trained)
    assert set(moments.m) == (trained if name in ("fedadam", "fedyogi") else set())
    assert all(v.dtype == np.float32 for v in after.values())


def test_the_moments_of_a_factor_wait_for_its_next_round():
    moments = Moments()
    _, moments = step("fedadam", [update(1, factor="a")], factor="a", moments=moments)
    kept = moments.m["q.lora_B.weight"]
    _, moments = step("fedadam", [update(2, factor="b")], factor="b", round_=2, moments=moments)
    assert moments.m["q.lora_B.weight"] is kept
    assert set(moments.m) == set(NAMES)


def test_zero_updates_leave_the_model_where_it_is():
    zero = {n: np.zeros(s, np.float32) for n, s in NAMES.items()}
    for name in ("fedavg", "fedadam", "fedyogi", "fedmedian", "fedtrimmedavg", "krum", "multikrum"):
        change, _ = step(name, [zero] * 5)
        assert not vector(change).any(), name


POISON = {
    "garbage": lambda honest: {
        n: np.random.default_rng(9).normal(0, 50, v.shape).astype("f4") for n, v in honest.items()
    },
    "huge": lambda honest: {n: np.full(v.shape, 1e30, np.float32) for n, v in honest.items()},
    "sign-flipped": lambda honest: {n: -20 * v for n, v in honest.items()},
}


@pytest.mark.parametrize("poison", POISON)
def test_one_poisoned_site_of_five_is_borne_by_robust_strategies_and_not_by_the_mean(poison):
    common = stacked([update(1)])[0]
    honest = [{n: update(1)[n] + 0.1 * update(seed)[n] for n in NAMES} for seed in (2, 3, 4, 5)]
    received = [*honest, POISON[poison](honest[0])]
    spread = max(np.linalg.norm(row - common) for row in stacked(honest))

    def distance(name):
        change, _ = step(name, received, trimmed_fraction=0.2, num_malicious=1)
        return np.linalg.norm(vector(change) - common)

    for name in ("fedmedian", "fedtrimmedavg", "krum", "multikrum"):
        assert distance(name) <= 2 * spread, name
    assert distance("fedavg") > 5 * spread


def test_the_order_in_which_updates_arrive_changes_nothing_that_counts():
    for name in ("fedavg", "fedmedian", "fedtrimmedavg", "krum", "multikrum"):
        one, _ = step(name, UPDATES, num_malicious=1)
        other, _ = step(name, UPDATES[::-1], num_malicious=1)
        np.testing.assert_allclose(vector(one), vector(other), atol=1e-7)


def test_bad_updates_are_refused_before_anything_is_combined():
    good = update(1)
    bad = {
        "nan": {**good, "q.bias": np.array([1, 2, np.nan, 4], np.float32)},
        "inf": {**good, "q.bias": np.array([1, 2, np.inf, 4], np.float32)},
        "shape": {**good, "q.bias": np.zeros(5, np.float32)},
        "missing": {n: v for n, v in good.items() if n != "q.bias"},
        "foreign": {**good, "x": np.zeros(1, np.float32)},
        "type": {**good, "q.bias": np.zeros(4)},
    }
    for name, one in bad.items():
        with pytest.raises(FederationRefusedError) as e:
            checked_update(one, weights(), None)
        assert e.value.reason == "bad_update", name
    frozen = {n: v for n, v in good.items() if "lora_A" not in n}
    assert checked_update(frozen, weights(), "a") is frozen
    with pytest.raises(FederationRefusedError):
        checked_update(good, weights(), "a")


@given(st.floats(0.01, 100), st.floats(1.001, 10))
def test_the_norm_ceiling_is_over_all_arrays_together(length, factor):
    one = {"x": np.array([0.6], np.float32), "y": np.array([[0.8]], np.float32)}
    scaled = {n: (length * v).astype(np.float32) for n, v in one.items()}
    assert checked_update(scaled, one, None, max_norm=length * factor) is scaled
    with pytest.raises(FederationRefusedError, match="max_update_norm"):
        checked_update(scaled, one, None, max_norm=length / factor)


def test_the_norm_of_the_largest_float32_does_not_overflow():
    largest = np.finfo(np.float32).max
    assert update_norm({"x": np.full(4, largest)}) == pytest.approx(2 * float(largest))


def test_a_model_that_would_overflow_is_refused():
    largest = {n: np.full(s, np.finfo(np.float32).max) for n, s in NAMES.items()}
    before = {n: np.full(s, 3e38, np.float32) for n, s in NAMES.items()}
    with pytest.raises(FederationRefusedError, match="max_update_norm"):
        combined(Strategy(), before, [largest], factor=None, round_=1, moments=Moments())


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({"name": "fedmedian"}, 3),
        ({"name": "fedtrimmedavg", "trimmed_fraction": 0.2}, 5),
        ({"name": "fedtrimmedavg", "trimmed_fraction": 0.34}, 3),
        ({"name": "krum", "num_malicious": 1}, 5),
        ({"name": "multikrum", "num_malicious": 2}, 7),
    ],
)
def test_a_robust_strategy_over_too_few_sites_is_refused(settings, needed):
    check_robust(make_job(sites=9, min_sites=needed, strategy=settings))
    with pytest.raises(FederationRefusedError, match=f"min_sites of at least {needed}") as e:
        check_robust(make_job(sites=9, min_sites=needed - 1, strategy=settings))
    assert e.value.reason == "too_few_sites"


def test_averages_need_one_site():
    check_robust(make_job(sites=2, min_sites=1, strategy={"name": "fedavg"}))


def test_flatten_and_the_test_s_own_order_agree():
    np.testing.assert_array_equal(flatten(UPDATES[0]), stacked(UPDATES[:1])[0].astype(np.float32))


def test_an_update_that_alone_would_overflow_the_model_is_refused_and_means_of_others_are_finite():
    largest = float(np.finfo(np.float32).max)
    before = {n: np.full(s, largest / 2, np.float32) for n, s in NAMES.items()}
    with pytest.raises(FederationRefusedError, match="infinite") as e:
        checked_update({n: np.full(s, largest, np.float32) for n, s in NAMES.items()}, before, None)
    assert e.value.reason == "bad_update"
    half = {n: np.full(s, np.nextafter(np.float32(largest / 2), np.float32(0)), np.float32) for n, s in NAMES.items()}
    assert checked_update(half, before, None) is half
    after, _ = combined(Strategy(), before, [half] * 5, factor=None, round_=1, moments=Moments())
    assert all(np.isfinite(v).all() for v in after.values())

"""The noise of a job: the least that keeps its target, the policy, the dataset's budget and other jobs' promises."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.tg_tinker.federated.site_lab import site_job
from tg_tinker.errors import FederationRefusedError
from tg_tinker.federated.site_budget import Holding, as_public, epsilon_of, merged, remaining, solve_noise
from tg_tinker.ledger.history import Terms
from tg_tinker.ledger.releases import Release
from tg_tinker.privacy.accounting import gate_epsilon

dp_accounting = pytest.importorskip("dp_accounting")
LOOSE = 1.0002


def holding(*, units=1000, target=math.inf, delta=1e-5, spent=None, promised=None, unit="datum"):
    terms = Terms(unit=unit, target_epsilon=target, target_delta=delta)
    return Holding(public_units=units, terms=terms, spent={} if spent is None else spent, promised=promised or {})


def by_dp_accounting(histogram, delta):
    """Epsilon by Google's accountant at the gate's orders; at broken ones its bound is looser, by up to 2e-4."""
    from dp_accounting import rdp

    accountant = rdp.RdpAccountant([1 + x / 10 for x in range(1, 100)] + list(range(12, 64)))
    for (sigma, rate), times in histogram.items():
        event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
        accountant.compose(event, times)
    return accountant.get_epsilon(delta)


JOB = site_job(rounds=20, local_steps=5, batch_size=50, records={"target_epsilon": 3.0, "target_delta": 1e-6})


def solved(job=JOB, *, floor=0.0, max_epsilon=8.0, **data):
    return solve_noise(job, holding(**data), floor=floor, max_epsilon=max_epsilon)


def test_alone_a_job_gets_the_least_noise_that_keeps_its_target():
    sigma = solved()
    assert by_dp_accounting({(sigma, 0.05): 100}, 1e-6) <= 3.0 * LOOSE
    assert by_dp_accounting({(sigma - 2e-4, 0.05): 100}, 1e-6) > 3.0


def test_the_policy_can_ask_for_more_noise_and_less_epsilon():
    assert solved(floor=2.5) == 2.5
    assert solved(floor=0.00001) == solved()
    sigma = solved(max_epsilon=1.0)
    assert by_dp_accounting({(sigma, 0.05): 100}, 1e-6) <= 1.0 * LOOSE
    assert by_dp_accounting({(sigma - 2e-4, 0.05): 100}, 1e-6) > 1.0


def test_what_was_spent_before_leaves_less_for_the_job():
    spent = {(1.0, 0.05): 60, (6.0, 1.0): 2}
    sigma = solved(target=4.0, spent=spent)
    assert sigma > solved()
    assert by_dp_accounting({**spent, (sigma, 0.05): 100}, 1e-5) <= 4.0 * LOOSE
    assert by_dp_accounting({**spent, (sigma - 2e-4, 0.05): 100}, 1e-5) > 4.0


def test_what_other_jobs_were_promised_is_left_to_them():
    other = site_job(rounds=10, local_steps=4, batch_size=100)
    promised = remaining(1.2, other, 1000, charged=7)
    assert promised == {(1.2, 0.1): 33}
    assert remaining(1.2, other, 1000, charged=40) == {}
    assert remaining(1.2, other, 1000, charged=41) == {}
    sigma = solved(target=4.0, promised=promised)
    assert sigma == solved(target=4.0, spent=promised) > solved(target=4.0)
    both = solved(target=4.0, spent={(1.2, 0.1): 10}, promised=promised)
    assert both == solved(target=4.0, spent={(1.2, 0.1): 43})


@pytest.mark.parametrize(
    "data",
    [
        {"units": 49},  # fewer units than a batch
        {"units": 2_000_000},  # delta would allow publishing a unit
        {"units": 600_000},  # the same, if there are almost twice as many as the site says in public
        {"target": 1.0, "spent": {(0.5, 1.0): 1}},  # spent
        {"target": 0.01},  # nothing keeps so small a target
    ],
)
def test_what_the_data_cannot_carry_is_refused_in_words_that_tell_no_size(data):
    with pytest.raises(FederationRefusedError, match="cannot carry") as caught:
        solved(**data)
    assert caught.value.reason == "policy"
    assert not any(c.isdigit() for c in caught.value.message)


def test_another_unit_and_a_history_without_noise_are_refused():
    with pytest.raises(FederationRefusedError, match="'user'"):
        solved(unit="user")
    with pytest.raises(FederationRefusedError, match="infinite"):
        solve_noise(JOB, Holding(**{**fields(holding()), "spent": None}), floor=0.0, max_epsilon=8.0)


def fields(value):
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


def test_epsilon_of_charges_is_the_gates():
    release = Release(kind="sampled_gaussian", noise_multiplier=1.1, sample_rate=0.02, vouched_by="server")
    assert epsilon_of([release] * 50, 1e-6) == gate_epsilon({(1.1, 0.02): 50}, 1e-6)
    assert epsilon_of([release] * 50, 1e-6) == pytest.approx(by_dp_accounting({(1.1, 0.02): 50}, 1e-6), rel=1e-6)
    assert epsilon_of([], 1e-6) == 0.0
    assert epsilon_of([release, Release(kind="unnoised", noise_multiplier=0.0)], 1e-6) == math.inf


def test_releases_seen_from_outside_depend_on_batch_sizes_and_the_public_size_alone():
    seen = [
        as_public({(1.0, 50 / n): 3, (2.0, 7 / n): 1, (5.0, 1.0): 2, (4.0, 600 / n): 1}, n, 512)
        for n in (600, 777, 1023)
    ]
    assert seen[0] == {(1.0, 50 / 512): 3, (2.0, 7 / 512): 1, (5.0, 1.0): 2, (4.0, 1.0): 1}
    assert seen[1] == seen[0] == seen[2]
    assert as_public(None, 600, 512) is None
    assert as_public({(1.0, 0.1): 1}, 1000, 1000) == {(1.0, 0.1): 1}


def test_histories_add_up():
    parts = [{(1.0, 0.1): 2}, {(1.0, 0.1): 3, (2.0, 0.1): 1}, {}]
    assert merged(parts) == {(1.0, 0.1): 5, (2.0, 0.1): 1}


def test_noise_is_a_multiple_of_a_ten_thousandth():
    for seed in range(5):
        target = float(np.random.default_rng(seed).uniform(1, 6))
        sigma = solved(target=target)
        assert round(sigma * 10_000) == pytest.approx(sigma * 10_000, abs=1e-6)

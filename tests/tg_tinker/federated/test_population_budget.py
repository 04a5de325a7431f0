"""Jobs over the same sites share one budget at the coordinator's server."""

from __future__ import annotations

import pytest

from tests.tg_tinker.federated.coordinating import coordinator, fake_sites, link_to
from tests.tg_tinker.federated.jobs import make_job
from tests.tg_tinker.federated.reported import DRAWN, honest, population, shared_job, site_level_forge
from tg_tinker.errors import FederationRefusedError
from tg_tinker.federated.result import ledger_of
from tg_tinker.privacy import gate_epsilon

SITES = {"population": 400, "sample_rate": 0.25, "noise_multiplier": 1.0, "target_delta": 1e-4}


def cost(*rounds, noise=1.0):
    return gate_epsilon({(noise, 0.25): sum(rounds)}, 1e-4)


def job(rounds=4, target=50.0, sites=3, **more):
    return {"sites": sites, "rounds": rounds, "sites_privacy": {**SITES, "target_epsilon": target}, **more}


def run(folder, service, settings):
    return coordinator(folder, service, job=settings).run(link_to(fake_sites(settings["sites"])))


def test_a_second_job_over_the_same_sites_goes_on_from_what_the_first_spent(tmp_path, coordinator_service):
    found = [run(tmp_path / str(seed), coordinator_service, job(rounds=2, seed=seed)) for seed in range(2)]
    assert found[0].job_digest != found[1].job_digest
    assert [r.sites.epsilon for r in found] == [pytest.approx(cost(2)), pytest.approx(cost(4))]
    assert len({r.sites.dataset_id for r in found}) == 1
    assert coordinator_service.get_privacy_ledger(found[0].sites.dataset_id).epsilon_spent == pytest.approx(cost(4))
    other = run(tmp_path / "other", coordinator_service, job(rounds=1, sites=2))
    assert other.sites.epsilon == pytest.approx(cost(1))


def test_a_job_that_earlier_ones_left_too_little_for_is_refused_before_anybody_is_asked(
    tmp_path, coordinator_service
):
    target = cost(5) * 1.0001
    run(tmp_path / "first", coordinator_service, job(rounds=4, target=target))
    link = link_to(fake_sites(3))
    with pytest.raises(FederationRefusedError, match="take fewer rounds, or more noise") as e:
        coordinator(tmp_path / "second", coordinator_service, job=job(rounds=2, target=target, seed=1)).run(link)
    assert e.value.reason == "hopeless"
    assert e.value.details["epsilon_before"] == pytest.approx(cost(4))
    assert e.value.details["epsilon"] == pytest.approx(cost(4, 2))
    last = run(tmp_path / "last", coordinator_service, job(rounds=1, target=target, seed=2))
    assert last.sites.epsilon == pytest.approx(cost(5))
    with pytest.raises(FederationRefusedError, match="nothing is left of the budget of these sites"):
        coordinator(tmp_path / "none", coordinator_service, job=job(rounds=1, target=target, seed=3)).run(link)
    with pytest.raises(FederationRefusedError, match="these sites have a budget already"):
        coordinator(tmp_path / "terms", coordinator_service, job=job(rounds=1, seed=4)).run(link)
    assert link.seen == []


def test_the_ledger_is_named_by_the_keys_on_the_roster_alone():
    one = make_job(sites=3)
    renamed = dict(zip(("x", "y", "z"), reversed(one.roster.values()), strict=True))
    assert ledger_of(one) == ledger_of(make_job(sites=3, rounds=9, seed=4, roster=renamed))
    assert ledger_of(one) != ledger_of(make_job(sites=4))
    assert ledger_of(one).startswith("federation-sites:")


def test_a_report_has_the_total_of_the_ledger_with_what_other_jobs_were_charged():
    reported = population()
    forge = site_level_forge(shared_job(sites_privacy=reported.result.job.sites), charges=3, closed=False)
    less = {**DRAWN, "noise_multiplier": "0.9"}
    for seq in (4, 5):
        forge.settle(forge.charge(seq, unit="site", event=less))
    reported.level = forge.close().sign()
    made = reported.document()["guarantee"]["sites"]
    assert float(made["epsilon"]) > float(population().document()["guarantee"]["sites"]["epsilon"])
    assert float(made["epsilon"]) == pytest.approx(gate_epsilon({(1.0, 0.1): 3, (0.9, 0.1): 2}, 1e-5), abs=2e-3)
    said = [v.shows for v in reported.verdicts() if v.check == "sites"]
    assert said[-1].endswith(
        "3 charges for 3 released rounds, on the terms of the job; 2 on other terms, by other jobs over these sites"
    )
    assert honest().result.sites is None

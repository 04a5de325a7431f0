"""Rounds under masks: the coordinator comes to the mean and never holds an update."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tg_tinker.federated.coordinating import Killed, coordinator, fake_sites, killing, link_to
from tests.tg_tinker.federated.fake_sites import pull_of
from tg_tinker.federated.adapter_store import AdapterStore
from tg_tinker.federated.masking import error_bound

JOB = {"sites": 4, "masking": {"clip": 0.25, "bits": 20, "threshold": 3}, "min_sites": 3}
SITES = tuple(f"site-{i}" for i in range(4))


def mean_of(sites, rounds=(1,), first=None):
    table = np.zeros((260, 260)) if first is None else first
    for number in rounds:
        updates = [np.clip(pull_of(s, {"table": table}, number)["table"], -0.25, 0.25) for s in sites]
        table = table + np.mean(updates, axis=0)
    return table


def table_of(service, result):
    return AdapterStore(service, result.job).load(result.artifact_id)["table"].astype(np.float64)


def check_blind(link, sites):
    """Nothing that arrived at the coordinator is, or contains, a site's update."""
    for reply in link.received:
        assert all(value.dtype == np.uint32 for value in reply.arrays.values())
        if reply.kind != "train":
            assert not reply.arrays
            continue
        site = next(s for s in sites if s.name == reply.site)
        plain = site.plain[reply.round]["table"].ravel().astype(np.float64)
        words = reply.arrays["masked"].astype(np.float64)
        # Independent numbers correlate by 1 / sqrt(67,600) = 0.0038; this fails by chance once in a million.
        assert abs(np.corrcoef(plain, words)[0, 1]) < 0.02


def test_the_coordinator_comes_to_the_mean_without_ever_holding_an_update(tmp_path, coordinator_service):
    sites = fake_sites(4)
    link = link_to(sites)
    result = coordinator(tmp_path, coordinator_service, job=JOB).run(link)
    assert (result.status, result.why) == ("finished", "")
    assert [(r.updates, r.attempts) for r in result.rounds] == [(4, 1), (4, 1)]
    np.testing.assert_allclose(
        table_of(coordinator_service, result), mean_of(SITES, (1, 2)), atol=2 * error_bound(0.25, 20) + 1e-6
    )
    check_blind(link, sites)
    assert result.trust["coordinator_sees_updates"] is False
    assert all(site.trained == {1: 1, 2: 1} for site in sites)


@pytest.mark.parametrize("kind", ["mask.keys", "mask.shares", "train", "mask.agree", "mask.open"])
def test_a_site_may_drop_out_at_any_step(tmp_path, coordinator_service, kind):
    sites = fake_sites(4)
    link = link_to(sites)
    link.faults["site-3", kind] = ["die"]
    result = coordinator(tmp_path, coordinator_service, job={**JOB, "rounds": 1}).run(link)
    counted = kind in ("mask.agree", "mask.open")  # its update was in the sum by then
    assert (result.status, result.rounds[0].attempts) == ("finished", 1)
    assert result.rounds[0].answers["site-3"].kind == ("update" if counted else "no_answer")
    expected = mean_of(SITES if counted else SITES[:3])
    np.testing.assert_allclose(table_of(coordinator_service, result), expected, atol=3e-6)
    check_blind(link, sites)


def test_an_attempt_with_too_few_is_repeated_with_fresh_masks_and_the_stored_updates(tmp_path, coordinator_service):
    sites = fake_sites(4)
    link = link_to(sites)
    for site in ("site-2", "site-3"):
        link.faults[site, "train"] = ["lose the reply"]
    result = coordinator(tmp_path, coordinator_service, job={**JOB, "rounds": 1}).run(link)
    assert (result.rounds[0].attempts, result.rounds[0].updates) == (2, 4)
    np.testing.assert_allclose(table_of(coordinator_service, result), mean_of(SITES), atol=3e-6)
    assert all(site.trained == {1: 1} for site in sites)
    masked = [r.arrays["masked"] for r in link.received if r.kind == "train" and r.site == "site-0"]
    assert (masked[0] != masked[1]).mean() > 0.99


def test_a_round_whose_shares_were_opened_and_lost_is_tried_with_the_same_sites_only(tmp_path, coordinator_service):
    sites = fake_sites(4)
    link = link_to(sites)
    link.faults["site-3", "train"] = ["die"]

    def kill(request):
        if request.kind == "mask.open" and request.site == "site-2":
            raise Killed

    link.before = kill
    with pytest.raises(Killed):
        coordinator(tmp_path, coordinator_service, job=JOB).run(link)
    link.before = lambda _: None
    result = coordinator(tmp_path, coordinator_service, job=JOB).run(link)
    assert result.status == "finished"
    assert "site-3" not in result.rounds[0].answers  # the sum with it, less this one, would be its update
    assert result.rounds[0].updates == 3
    assert result.rounds[1].updates == 4
    check_blind(link, sites)


def test_a_sum_that_can_not_be_opened_again_is_skipped_and_the_job_goes_on(tmp_path, coordinator_service):
    sites = fake_sites(4)
    link = link_to(sites)
    link.faults["site-3", "train"] = ["die"]

    def kill(request):
        if request.kind == "mask.open" and request.site == "site-2":
            raise Killed

    link.before = kill
    with pytest.raises(Killed):
        coordinator(tmp_path, coordinator_service, job=JOB, max_attempts=2).run(link)
    link.before = lambda request: link.down.discard("site-1") if request.round == 2 else None
    link.down = {"site-1"}  # it was in the sum that was opened, and is away for the rest of the round
    result = coordinator(tmp_path, coordinator_service, job=JOB, max_attempts=2).run(link)
    assert result.status == "finished"
    assert result.rounds[0].skipped
    assert (result.rounds[0].updates, result.rounds[0].weights_digest) == (0, result.job.adapter_digest)
    assert result.rounds[1].updates >= 3
    check_blind(link, sites)


def test_with_the_weights_of_a_lost_sum_nobody_trains_before_all_of_it_are_back(tmp_path, coordinator_service):
    """Sites open no other sum with these weights, so training would be paid for and lost."""
    sites = fake_sites(5)
    job = {"sites": 5, "masking": {"clip": 0.25, "bits": 20, "threshold": 3}, "min_sites": 3, "rounds": 4}
    link = link_to(sites)
    link.faults["site-4", "train"] = ["die"]

    def kill(request):
        if request.kind == "mask.open" and request.site == "site-2":
            raise Killed

    link.before = kill
    with pytest.raises(Killed):
        coordinator(tmp_path, coordinator_service, job=job, max_attempts=2).run(link)
    link.before = lambda request: link.down.discard("site-1") if request.round == 3 else None
    link.down = {"site-1"}
    result = coordinator(tmp_path, coordinator_service, job=job, max_attempts=2).run(link)
    assert result.status == "finished"
    assert [bool(r.skipped) for r in result.rounds] == [True, True, False, False]
    assert "not all are there" in result.rounds[1].skipped
    assert [r.updates for r in result.rounds] == [0, 0, 4, 5]
    assert not any(2 in site.trained for site in sites)
    assert "site-4" not in result.rounds[2].answers
    expected = mean_of([f"site-{i}" for i in range(5)], (4,), mean_of([f"site-{i}" for i in range(4)], (3,)))
    np.testing.assert_allclose(table_of(coordinator_service, result), expected, atol=6e-6)


def test_what_is_no_masked_update_is_left_out_by_name(tmp_path, coordinator_service):
    sites = fake_sites(4)
    link = link_to(sites)
    honest = link.handlers["site-1"]

    def garbled(request):
        reply = honest(request)
        if request.kind != "train":
            return reply
        return request.reply(arrays={"masked": np.zeros(3, np.uint32)}).signed(sites[1].key)

    link.handlers["site-1"] = garbled
    result = coordinator(tmp_path, coordinator_service, job={**JOB, "rounds": 1}).run(link)
    assert result.rounds[0].answers["site-1"].kind == "bad_update"
    expected = mean_of(("site-0", "site-2", "site-3"))
    np.testing.assert_allclose(table_of(coordinator_service, result), expected, atol=3e-6)


def test_half_an_adapter_is_masked_where_half_is_trained(tmp_path, coordinator_service):
    job = {**JOB, "rounds": 1, "federated_lora": "freeze_a"}
    result = coordinator(tmp_path, coordinator_service, job=job).run(link_to(fake_sites(4)))
    assert result.status == "finished"  # the bigram's table is no factor and is always trained


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_effect_a_masked_job_ends_and_nobody_trains_twice(
    tmp_path, coordinator_service, monkeypatch, after
):
    with killing(monkeypatch, at=0, after=False) as effects:
        coordinator(tmp_path / "clean", coordinator_service, job=JOB).run(link_to(fake_sites(4)))
    for at in range(1, len(effects) + 1):
        sites = fake_sites(4)
        link, folder = link_to(sites), tmp_path / f"at-{at}"
        with killing(monkeypatch, at=at, after=after), pytest.raises(Killed):
            coordinator(folder, coordinator_service, job=JOB).run(link)
        result = coordinator(folder, coordinator_service, job=JOB).run(link)
        assert result.status == "finished", (at, effects[at - 1], result.why)
        assert not any(r.skipped for r in result.rounds), (at, effects[at - 1])
        assert all(set(site.trained.values()) == {1} for site in sites), at
        check_blind(link, sites)

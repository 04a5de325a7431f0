"""A whole job over a link in memory, with a real server for the coordinator: what comes out, and what goes wrong."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from tests.tg_tinker.federated.coordinating import (
    Killed,
    coordinator,
    fake_sites,
    killing,
    link_to,
)
from tests.tg_tinker.federated.fake_sites import pull_of
from tests.tg_tinker.federated.jobs import key_of
from tg_tinker.errors import FederationRefusedError, InvalidRequestError
from tg_tinker.federated.adapter_store import NOTHING_SPENT, AdapterStore
from tg_tinker.federated.result import FederatedResult
from tg_tinker.federated.statement import sign_statement, verify_statement
from tg_tinker.federated.updates import weights_digest


def weights_of(service, result):
    return AdapterStore(service, result.job).load(result.artifact_id)["table"].astype(np.float64)


def expected(rounds=2, sites=("site-0", "site-1", "site-2"), first=0.0):
    table = np.full((260, 260), first) if np.isscalar(first) else first
    for number in range(1, rounds + 1):
        table = table + np.mean([pull_of(s, {"table": table}, number)["table"] for s in sites], axis=0)
    return table


def notes(service):
    return [e.operation for e in service.get_audit_logs(limit=1000) if e.operation.startswith("federation.")]


def test_a_job_of_fedavg_is_the_mean_of_the_updates_round_by_round(tmp_path, coordinator_service):
    sites, seen = fake_sites(), []
    result = coordinator(tmp_path, coordinator_service, progress=seen.append).run(link_to(sites))
    table = weights_of(coordinator_service, result)
    assert table.shape == (260, 260)
    np.testing.assert_allclose(table, expected(), atol=1e-6)
    assert (result.status, result.why, result.members) == ("finished", "", ("site-0", "site-1", "site-2"))
    assert [(r.round, r.attempts, r.updates) for r in result.rounds] == [(1, 1, 3), (2, 1, 3)]
    assert result.artifact_id == result.rounds[-1].artifact_id
    assert result.weights_digest == weights_digest({"table": table.astype(np.float32)})
    assert FederatedResult.model_validate_json((tmp_path / "state" / "result.json").read_text()) == result
    for name, statement in result.statements.items():
        assert verify_statement(statement, result.job.roster[name]).rounds == (1, 2)
    assert set(result.statements) == {"site-0", "site-1", "site-2"}
    assert notes(coordinator_service) == [
        "federation.round_released",
        "federation.round_released",
        "federation.job_finished",
    ]
    assert [p.what for p in seen if not p.site] == ["asked", "released", "asked", "released", "finished"]
    assert {(p.site, p.round) for p in seen if p.what == "answered"} == {(s.name, r) for s in sites for r in (1, 2)}
    sources = coordinator_service.list_artifacts()
    assert len(sources) == 3  # the first adapter, and one after each round


def test_the_job_names_the_adapter_that_the_server_drew_and_keeps_it(tmp_path, coordinator_service):
    one = coordinator(tmp_path, coordinator_service)
    job = one.prepare()
    assert one.prepare() == job
    link = link_to(fake_sites())
    assert one.run(link).job == job
    first = next(r for r in link.seen if r.kind == "train")
    assert weights_digest(first.arrays) == job.adapter_digest


def test_running_a_finished_job_again_changes_nothing(tmp_path, coordinator_service):
    sites = fake_sites()
    link = link_to(sites)
    one = coordinator(tmp_path, coordinator_service)
    first = one.run(link)
    sent = len(link.seen)
    second = one.run(link)
    assert second.model_copy(update={"ended": first.ended}) == first
    assert len(link.seen) == sent


@pytest.mark.parametrize("name", ["fedadam", "fedyogi"])
def test_what_an_adaptive_strategy_remembers_survives_a_kill(tmp_path, coordinator_service, name):
    job = {"rounds": 3, "strategy": {"name": name}}
    whole = coordinator(tmp_path / "whole", coordinator_service, job=job).run(link_to(fake_sites()))
    link = link_to(fake_sites())

    def kill(request):
        if request.round == 3:
            raise Killed

    link.before = kill
    broken = coordinator(tmp_path / "broken", coordinator_service, job=job)
    with pytest.raises(Killed):
        broken.run(link)
    link.before = lambda _: None
    result = coordinator(tmp_path / "broken", coordinator_service, job=job).run(link)
    assert result.weights_digest == whole.weights_digest
    np.testing.assert_allclose(weights_of(coordinator_service, result), adaptive_by_hand(name, 3), atol=1e-5)


def adaptive_by_hand(name, rounds):
    """Reddi et al. 2021 with the job's defaults; FedAdam with Flower's bias correction."""
    table, m, v = np.zeros((260, 260)), 0.0, 0.0
    for number in range(1, rounds + 1):
        delta = np.mean([pull_of(f"site-{i}", {"table": table}, number)["table"] for i in range(3)], axis=0)
        m = 0.9 * m + 0.1 * delta
        if name == "fedadam":
            v = 0.99 * v + 0.01 * delta**2
            rate = 0.1 * np.sqrt(1 - 0.99 ** (number + 1)) / (1 - 0.9 ** (number + 1))
        else:
            v, rate = v - 0.01 * delta**2 * np.sign(v - delta**2), 0.1
        table = table + rate * m / (np.sqrt(v) + 1e-3)
    return table


def test_no_attempt_has_the_number_of_one_before_a_kill(tmp_path, coordinator_service):
    link = link_to(fake_sites())

    def kill(request):
        if request.kind == "train":
            raise Killed

    link.before = kill
    for _ in range(2):
        with pytest.raises(Killed):
            coordinator(tmp_path, coordinator_service).run(link)
    link.before = lambda _: None
    result = coordinator(tmp_path, coordinator_service).run(link)
    places = [(r.round, r.attempt) for r in link.seen if r.kind == "train" and r.site == "site-0"]
    assert places == [(1, 1), (1, 2), (1, 3), (2, 1)]
    assert result.rounds[0].attempts == 3


def test_sites_that_refuse_the_job_are_left_out_with_their_reasons(tmp_path, coordinator_service):
    sites = fake_sites(4)
    sites[1].refuses["join"] = "policy"
    seen = []
    link = link_to(sites)
    result = coordinator(tmp_path, coordinator_service, job={"sites": 4}, progress=seen.append).run(link)
    assert result.status == "finished"
    assert (result.left["site-1"].reason, result.left["site-1"].message) == ("policy", "not here")
    assert link.count("train", "site-1") == 0
    np.testing.assert_allclose(
        weights_of(coordinator_service, result), expected(sites=("site-0", "site-2", "site-3")), atol=1e-6
    )


def test_a_job_that_too_few_join_fails_and_goes_on_when_they_come(tmp_path, coordinator_service):
    link = link_to(fake_sites())
    link.down = {"site-0", "site-1"}
    job = {"min_sites": 2}
    result = coordinator(tmp_path, coordinator_service, job=job).run(link)
    assert result.status == "failed"
    assert "1 of 3 sites joined, 2 are needed; site-0: no_answer" in result.why
    assert result.unheard == ("site-0", "site-1")
    assert link.count("finish") == 0
    link.down = set()
    again = coordinator(tmp_path, coordinator_service, job=job).run(link)
    assert (again.status, again.why, again.job) == ("finished", "", result.job)
    assert notes(coordinator_service)[0] == "federation.round_failed"


def test_a_site_that_appears_later_takes_part_from_then_on(tmp_path, coordinator_service):
    link = link_to(fake_sites())
    link.down = {"site-2"}
    link.before = lambda request: link.down.discard("site-2") if request.round == 2 else None
    result = coordinator(tmp_path, coordinator_service, job={"rounds": 3}).run(link)
    assert [r.updates for r in result.rounds] == [2, 2, 3]
    assert set(result.rounds[0].answers) == {"site-0", "site-1"}


@pytest.mark.parametrize("fault", ["lose the request", "lose the reply", "late", "alter", "die", "repeat"])
def test_a_fault_on_the_way_costs_an_attempt_and_never_a_second_training(tmp_path, coordinator_service, fault):
    sites = fake_sites()
    link = link_to(sites)
    link.faults["site-1", "train"] = ["", fault]
    result = coordinator(tmp_path, coordinator_service, job={"min_sites": 3}).run(link)
    assert result.status == "finished"
    assert [r.attempts for r in result.rounds] == [1, {"repeat": 1, "late": 3}.get(fault, 2)]
    np.testing.assert_allclose(weights_of(coordinator_service, result), expected(), atol=1e-6)
    assert all(site.trained == {1: 1, 2: 1} for site in sites)
    assert link.count("train", "site-0") == 2  # whose update is in hand is not asked again


def test_a_straggler_is_left_out_and_its_late_reply_counts_for_nothing(tmp_path, coordinator_service):
    link = link_to(fake_sites())
    link.faults["site-2", "train"] = ["late"]
    result = coordinator(tmp_path, coordinator_service).run(link)
    assert [r.updates for r in result.rounds] == [2, 2]
    assert result.rounds[0].answers["site-2"].message == "no reply in time"
    assert result.rounds[1].answers["site-2"].message == "its reply answers another request"
    two = ("site-0", "site-1")
    np.testing.assert_allclose(weights_of(coordinator_service, result), expected(sites=two), atol=1e-6)


def test_a_round_that_too_few_answer_fails_the_job_and_it_may_be_tried_again(tmp_path, coordinator_service):
    link = link_to(fake_sites())
    link.faults["site-1", "train"] = ["", *["die"] * 2]
    job = {"min_sites": 3}
    result = coordinator(tmp_path, coordinator_service, job=job, max_attempts=2).run(link)
    assert result.status == "failed"
    assert "round 2 has 2 updates and needs 3, after 2 attempts; site-1: no_answer its app crashed" in result.why
    assert len(result.rounds) == 1
    again = coordinator(tmp_path, coordinator_service, job=job, max_attempts=2).run(link)
    assert again.status == "finished"
    assert again.rounds[1].attempts == 3  # attempts are counted on, so that no reply fits two of them
    np.testing.assert_allclose(weights_of(coordinator_service, again), expected(), atol=1e-6)


BAD = {
    "nan": lambda w, r: {"table": np.full_like(w["table"], np.nan)},
    "shape": lambda w, r: {"table": np.zeros((2, 2), np.float32)},
    "names": lambda w, r: {"tables": w["table"]},
    "type": lambda w, r: {"table": w["table"].astype(np.float64)},
    "too long": lambda w, r: {"table": np.full_like(w["table"], 1e3)},
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_update_is_refused_by_name_and_the_round_goes_on(tmp_path, coordinator_service, bad):
    link = link_to(fake_sites(site_1=BAD[bad]))
    result = coordinator(tmp_path, coordinator_service, max_update_norm=1e4).run(link)
    for record in result.rounds:
        assert (record.answers["site-1"].kind, record.answers["site-1"].reason) == ("bad_update", "bad_update")
        assert record.updates == 2
    two = ("site-0", "site-2")
    np.testing.assert_allclose(weights_of(coordinator_service, result), expected(sites=two), atol=1e-6)
    assert notes(coordinator_service).count("federation.round_refused") == 2


@pytest.mark.parametrize("settings", [{}, {"max_update_norm": None}])
@pytest.mark.parametrize("name", ["fedavg", "fedadam"])
def test_the_largest_update_ends_no_job(tmp_path, coordinator_service, name, settings):
    """In the first round it fits the model, so that only the default ceiling, or the next round, can refuse it."""
    huge = lambda w, r: {n: np.full_like(v, 3.0e38) for n, v in w.items()}  # noqa: E731
    job = {"rounds": 3, "min_sites": 2, "strategy": {"name": name}}
    result = coordinator(tmp_path, coordinator_service, job=job, **settings).run(link_to(fake_sites(site_1=huge)))
    assert result.status == "finished"
    if not settings:
        assert [r.answers["site-1"].kind for r in result.rounds] == ["bad_update"] * 3
        assert "max_update_norm" in result.rounds[0].answers["site-1"].message


def test_a_zero_update_is_an_update(tmp_path, coordinator_service):
    zero = lambda w, r: {n: np.zeros_like(v) for n, v in w.items()}  # noqa: E731
    updates = {"site_0": zero, "site_1": zero, "site_2": zero}
    result = coordinator(tmp_path, coordinator_service).run(link_to(fake_sites(**updates)))
    assert result.weights_digest == result.job.adapter_digest


@pytest.mark.parametrize("name", ["fedmedian", "fedtrimmedavg", "krum", "multikrum", "fedavg"])
def test_one_poisoned_site_of_five_moves_the_average_and_no_robust_model(tmp_path, coordinator_service, name):
    poison = lambda w, r: {n: np.full_like(v, -50.0) for n, v in w.items()}  # noqa: E731
    strategy = {"name": name, "num_malicious": 1}
    job = {"sites": 5, "min_sites": 5, "rounds": 1, "strategy": strategy}
    link = link_to(fake_sites(5, site_4=poison))
    result = coordinator(tmp_path, coordinator_service, job=job, max_update_norm=None).run(link)
    clean = expected(rounds=1, sites=tuple(f"site-{i}" for i in range(4)))
    off = np.abs(weights_of(coordinator_service, result) - clean).mean()
    assert off > 5 if name == "fedavg" else off < 0.2
    assert result.trust["poisoned_updates_borne"] == {"fedmedian": 2, "fedavg": 0}.get(name, 1)


def test_an_expired_job_is_refused_before_and_fails_on_the_way(tmp_path, coordinator_service):
    soon = datetime.now(UTC) + timedelta(hours=1)
    job = {"expires": soon}
    late = {"now": lambda: soon}
    with pytest.raises(FederationRefusedError) as e:
        coordinator(tmp_path / "a", coordinator_service, job=job, **late).run(link_to(fake_sites()))
    assert e.value.reason == "expired"
    coordinator(tmp_path / "b", coordinator_service, job=job).prepare()
    link = link_to(fake_sites())
    result = coordinator(tmp_path / "b", coordinator_service, job=job, **late).run(link)
    assert (result.status, link.seen) == ("failed", [])
    assert "expired" in result.why


def test_a_job_that_cannot_work_is_refused_before_anybody_is_asked(tmp_path, coordinator_service):
    for number, (job, reason) in enumerate(
        [
            ({"strategy": {"name": "krum", "num_malicious": 1}, "min_sites": 3}, "too_few_sites"),
            ({"sites_privacy": {"population": 3, "noise_multiplier": 0.5, "target_epsilon": 1e3}}, "hopeless"),
            ({"sites": 2, "masking": {}}, "too_few_sites"),
        ]
    ):
        link = link_to(fake_sites())
        with pytest.raises(FederationRefusedError) as e:
            coordinator(tmp_path / str(number), coordinator_service, job=job).run(link)
        assert (e.value.reason, link.seen) == (reason, [])


def test_a_folder_of_another_job_or_key_is_refused(tmp_path, coordinator_service, monkeypatch):
    coordinator(tmp_path, coordinator_service).prepare()
    with pytest.raises(InvalidRequestError, match="another job"):
        coordinator(tmp_path, coordinator_service, job={"rounds": 3}).prepare()
    monkeypatch.setattr("tests.tg_tinker.federated.coordinating.KEY", key_of("another"))
    with pytest.raises(InvalidRequestError, match="another key"):
        coordinator(tmp_path, coordinator_service).prepare()


def test_each_released_adapter_is_evaluated_and_a_failing_evaluation_loses_nothing(tmp_path, coordinator_service):
    def evaluate(released):
        if released.round == 2 and not again:
            raise Killed
        return {"mean": released.weights["table"].mean()}

    sites, again = fake_sites(), False
    one = coordinator(tmp_path, coordinator_service, evaluate=evaluate)
    with pytest.raises(Killed):
        one.run(link_to(sites))
    again = True
    result = one.run(link_to(sites))
    assert result.status == "finished"
    assert result.first_metrics == {"mean": 0.0}
    assert result.rounds[0].metrics == {"mean": pytest.approx(expected(1).mean(), abs=1e-6)}
    assert all(site.trained == {1: 1, 2: 1} for site in sites)


def test_a_job_given_up_collects_what_sites_spent(tmp_path, coordinator_service):
    link = link_to(fake_sites())
    link.faults["site-1", "train"] = ["", *["die"] * 9]
    job = {"min_sites": 3}
    coordinator(tmp_path, coordinator_service, job=job).run(link)
    result = coordinator(tmp_path, coordinator_service, job=job).finish(link)
    assert (result.status, set(result.statements)) == ("failed", {"site-0", "site-1", "site-2"})
    assert "round 2" in result.why


PAYLOADS = {"a list as payload": [], "an object as payload": {}, "a number as payload": 5, "no payload": None}


@pytest.mark.parametrize("what", ["of another site", "of another job", "no statement", "no object", *PAYLOADS])
def test_a_forged_or_missing_statement_is_not_taken(tmp_path, coordinator_service, what):
    sites = fake_sites()
    link = link_to(sites)
    link.faults["site-0", "finish"] = ["die"]
    honest = sites[1].handle

    def forged(request):
        reply = honest(request)
        if request.kind != "finish":
            return reply
        said = sites[1].statement(sites[1].job)
        said = {
            "of another site": lambda: sites[2].handle(request).facts["statement"],
            "of another job": lambda: sign_statement(said.model_copy(update={"job": "1" * 64}), sites[1].key),
            "no statement": lambda: {"epsilon": 0},
            "no object": lambda: "epsilon 0",
            **{
                name: lambda p=p: {"payload": p, "payloadType": "x", "signatures": []} for name, p in PAYLOADS.items()
            },
        }[what]()
        return request.reply(facts={"statement": said}).signed(sites[1].key)

    link.handlers["site-1"] = forged
    one = coordinator(tmp_path, coordinator_service)
    result = one.run(link)
    assert set(result.statements) == {"site-2"}
    assert result.unstated["site-0"] == "its app crashed"
    assert "no statement" in result.unstated["site-1"]
    link.handlers["site-1"] = honest
    assert set(one.run(link).statements) == {"site-0", "site-1", "site-2"}


def test_an_adapter_that_is_not_the_one_in_the_state_is_refused(tmp_path, coordinator_service):
    one = coordinator(tmp_path, coordinator_service)
    state = tmp_path / "state" / "state.json"
    job = one.prepare()
    other = AdapterStore(coordinator_service, job).keep({"table": np.ones((260, 260), np.float32)}, 0, NOTHING_SPENT)
    text = json.loads(state.read_text())
    state.write_text(json.dumps({**text, "adapter": other}))
    with pytest.raises(InvalidRequestError, match="not the adapter"):
        one.run(link_to(fake_sites()))


def test_replies_with_another_key_or_of_another_site_are_not_taken(tmp_path, coordinator_service):
    sites = fake_sites()
    link = link_to(sites)
    link.handlers["site-1"] = lambda r: r.reply(arrays=r.arrays).signed(key_of("mallory"))
    link.handlers["site-2"] = sites[0].handle
    result = coordinator(tmp_path, coordinator_service).run(link)
    assert result.members == ("site-0",)
    assert result.unheard == ("site-1", "site-2")


def kill_points(tmp_path, service, monkeypatch, job, make_sites):
    """How many effects a clean run has, and what it comes to."""
    sites = make_sites()
    with killing(monkeypatch, at=0, after=False) as done:
        result = coordinator(tmp_path / "clean", service, job=job).run(link_to(sites))
    return len(done), result


@pytest.mark.parametrize(
    ("after", "every"),
    [(False, 3), pytest.param(False, 1, marks=pytest.mark.slow), pytest.param(True, 1, marks=pytest.mark.slow)],
)
def test_killed_at_any_effect_it_comes_to_the_same_model_and_no_site_trains_twice(
    tmp_path, coordinator_service, monkeypatch, after, every
):
    job = {"sites": 2, "strategy": {"name": "fedadam"}}
    effects, clean = kill_points(tmp_path, coordinator_service, monkeypatch, job, lambda: fake_sites(2))
    assert effects > 25
    for at in range(1, effects + 1, every):
        sites = fake_sites(2)
        link, folder = link_to(sites), tmp_path / f"at-{at}"
        with killing(monkeypatch, at=at, after=after), pytest.raises(Killed):
            coordinator(folder, coordinator_service, job=job).run(link)
        result = coordinator(folder, coordinator_service, job=job).run(link)
        assert (result.status, result.weights_digest) == ("finished", clean.weights_digest), at
        assert all(site.trained == {1: 1, 2: 1} for site in sites), at
        assert set(result.statements) == {"site-0", "site-1"}, at

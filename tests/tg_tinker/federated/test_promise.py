"""The promise to people, where sites sign that they spent more than the job allowed: result and report agree."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import pytest

from tests.tg_tinker.federated.coordinating import coordinator, fake_sites, link_to
from tests.tg_tinker.federated.jobs import key_of, names
from tests.tg_tinker.federated.reported import (
    ALL,
    RECORDS,
    UPDATE,
    Reported,
    result_of,
    shared_job,
    signed,
    statement_of,
    took_part,
)
from tg_tinker.federated.result import FederatedResult, promise_of
from tg_tinker.federated.statement import sign_statement


def stating(people: str, **changes: Any) -> Reported:
    """An honest job of three sites, but for site-1's statement."""
    job = shared_job(records={**RECORDS, "people": people})
    statements = {s: signed(job, s, ALL) for s in names(3)}
    statements["site-1"] = signed(job, "site-1", ALL, accounting=None, **changes)
    rounds = [took_part(r, dict.fromkeys(names(3), UPDATE)) for r in ALL]
    return Reported(result_of(job, rounds, statements=statements, records=promise_of(job, statements)))


OVER = {"epsilon": "7.50", "dataset_epsilon": "7.50"}


@pytest.mark.parametrize(
    ("people", "changes", "result", "report"),
    [
        # The result has the job's target for a site that kept to it, the report what it stated: 3.03.
        ("disjoint", OVER, (7.5, 1e-5), ("7.5", "0.00001")),
        ("shared", OVER, (6 + 7.5 + 6, 3e-5), ("13.56", "0.00003")),
        ("disjoint", {**OVER, "delta": "0.001"}, (7.5, 1e-3), ("7.5", "0.001")),
        ("shared", {"delta": "0.001"}, (18, 1.02e-3), ("9.09", "0.00102")),
        ("disjoint", {**OVER, "target_epsilon": "8.0"}, (7.5, 1e-5), ("7.5", "0.00001")),
    ],
)
def test_more_than_the_target_weakens_the_promise_of_result_and_report(
    people: str, changes: dict[str, str], result: tuple[float, float], report: tuple[str, str]
) -> None:
    reported = stating(people, **changes)
    promise, made = reported.result.records, reported.document()
    assert (promise.epsilon, promise.delta) == pytest.approx(result)
    assert list(promise.broken) == ["site-1"]
    records = made["guarantee"]["records"]
    assert (Decimal(records["epsilon"]), Decimal(records["delta"])) == tuple(map(Decimal, report))
    assert f"exp({report[0]})" in made["guarantee"]["sentence"]
    assert made["unstated"] == {}
    assert reported.verdicts()


def test_no_privacy_stated_by_one_leaves_no_promise() -> None:
    unbounded = dict.fromkeys(("epsilon", "dataset_epsilon", "dataset_target_epsilon"), "inf")
    reported = stating("disjoint", **unbounded)
    assert reported.result.records.epsilon is None
    assert "epsilon inf, and the job's target is 6.0" in reported.result.records.broken["site-1"]
    assert reported.document()["guarantee"]["records"]["epsilon"] == "inf"
    assert reported.verdicts()


def test_another_unit_says_nothing_of_the_jobs_and_is_named() -> None:
    reported = stating("disjoint", unit="user", **OVER)
    assert reported.result.records.epsilon == 6
    assert "unit 'user', and the job's is 'datum'" in reported.result.records.broken["site-1"]
    assert "cannot be used" in reported.document()["unstated"]["site-1"]
    assert reported.verdicts()


def test_an_epsilon_that_was_rounded_up_keeps_the_target() -> None:
    job = shared_job(records={**RECORDS, "target_epsilon": 2.005, "people": "disjoint"})
    kept = signed(job, "site-1", ALL, epsilon="2.01", dataset_epsilon="2.01")
    promise = promise_of(job, {"site-1": kept})
    assert (promise.epsilon, promise.broken) == (2.01, {})
    passed = signed(job, "site-1", ALL, epsilon="2.02", dataset_epsilon="2.02")
    assert set(promise_of(job, {"site-1": passed}).broken) == {"site-1"}


def test_what_a_site_did_not_sign_on_this_job_moves_no_promise() -> None:
    job = shared_job()
    more = statement_of(job, "site-1", ALL, **OVER)
    for envelope in (
        sign_statement(more, key_of("site-2")),
        sign_statement(more.model_copy(update={"job": "0" * 64}), key_of("site-1")),
        sign_statement(more.model_copy(update={"site": "site-2"}), key_of("site-1")),
        {},
    ):
        assert promise_of(job, {"site-1": envelope, "stranger": envelope}) == promise_of(job)
    assert promise_of(job).epsilon == 3 * 6


def test_a_coordinator_writes_down_what_sites_stated(tmp_path, coordinator_service):  # type: ignore[no-untyped-def]
    sites = fake_sites()
    honest = sites[0].statement
    sites[0].statement = lambda job: honest(job).model_copy(update={"epsilon": "7.50", "delta": "0.001"})  # type: ignore[method-assign]
    records = {"target_epsilon": 2.0, "target_delta": 1e-5, "people": "disjoint"}
    result = coordinator(tmp_path, coordinator_service, job={"records": records}).run(link_to(sites))
    assert (result.status, result.records.epsilon, result.records.delta) == ("finished", 7.5, 1e-3)
    assert "epsilon 7.50, and the job's target is 2.0" in result.records.broken["site-0"]
    written = (tmp_path / "state" / "result.json").read_text()
    assert FederatedResult.model_validate_json(written) == result
    assert math.isfinite(result.records.epsilon)

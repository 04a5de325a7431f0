"""A federation report says what its job, its sites and its ledger say; nothing else is ever written."""

from __future__ import annotations

import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tg_tinker.federated.jobs import key_of, names
from tests.tg_tinker.federated.reported import (
    ALL,
    COORDINATOR,
    MASKING,
    RECORDS,
    SITES,
    UPDATE,
    Reported,
    honest,
    population,
    result_of,
    shared_job,
    signed,
    site_level_forge,
    statement_of,
    took_part,
    uneven,
    verify,
)
from tg_tinker.errors import InvalidRequestError
from tg_tinker.federated.report import PAYLOAD_TYPE, coordinator_key
from tg_tinker.federated.report_facts import Facts
from tg_tinker.federated.report_file import write_report
from tg_tinker.federated.report_words import delta_text, epsilon_text
from tg_tinker.federated.result import ledger_of
from tg_tinker.federated.site_privacy import SiteMechanism
from tg_tinker.reports.statement import PAYLOAD_TYPE as PRIVACY_REPORT


def checks(reported: Reported) -> list[str]:
    return [v.check for v in reported.verdicts()]


# What an honest coordinator writes.


def test_an_honest_report_passes_every_check() -> None:
    assert checks(honest()) == [
        "signature", "format", "job", "course", "statement", "statement", "statement", "second accountant",
        "guarantee", "coverage",
    ]  # fmt: skip


def test_the_promise_over_sites_is_the_sum_or_the_largest_as_the_job_declares() -> None:
    apart = {**RECORDS, "people": "disjoint"}
    stated = [Decimal(statement_of(shared_job(), s, ALL).epsilon) for s in names(3)]
    summed, largest = honest().document()["guarantee"], honest(records=apart).document()["guarantee"]
    assert Decimal(summed["records"]["epsilon"]) == sum(stated) == Decimal("9.09")
    assert (summed["records"]["delta"], summed["records"]["over_sites"]) == ("3e-5", "sum")
    assert Decimal(largest["records"]["epsilon"]) == max(stated) == Decimal("3.03")
    assert (largest["records"]["delta"], largest["records"]["over_sites"]) == ("1e-5", "max")
    assert "one record at each of 3 sites at once" in summed["sentence"]
    assert "exp(9.09), except with probability 3e-5: the sum over all sites" in summed["sentence"]
    assert "one record at one site" in largest["sentence"]
    assert "the largest figure of 3 sites, since the job declares nobody to be at two" in largest["sentence"]


def test_a_site_without_a_statement_counts_at_the_jobs_target() -> None:
    made = uneven().document()
    assert made["guarantee"]["records"]["epsilon"] == "17.8"  # 3.03 + 2.77 + 6 + 6
    assert [(s["epsilon"], s["statement"], s["membership"], s["rounds_used"]) for s in made["sites"]] == [
        ("3.03", "signed", "member", 3),
        ("6", "missing", "member", 2),
        ("2.77", "signed", "left", 2),
        ("6", "missing", "silent", 0),
    ]
    said = [v.shows for v in uneven().verdicts() if v.check == "statement"]
    assert said[-1] == "MISSING from site-1, site-3: counted at the job's target, 6.0"
    largest = uneven(records={**RECORDS, "people": "disjoint"}).document()["guarantee"]["records"]
    assert largest["epsilon"] == "6"


def test_a_job_without_privacy_of_records_promises_nothing() -> None:
    job = shared_job(records=None)
    rounds = [took_part(r, dict.fromkeys(names(3), UPDATE)) for r in ALL]
    unprotected = {"epsilon": "inf", "dataset_epsilon": "inf", "dataset_target_epsilon": "inf", "accounting": None}
    statements = {s: signed(job, s, ALL, **unprotected) for s in names(3)}
    reported = Reported(result_of(job, rounds, statements=statements))
    made = reported.document()
    assert made["guarantee"] == {
        "records": None,
        "sites": None,
        "sentence": "Nothing is promised about any record: the job trained without privacy of records.",
    }
    assert made["coverage"]["covered"] == ["Nothing: neither records nor sites were protected."]
    assert {(row["epsilon"], row["basis"]) for row in made["sites"]} == {("inf", "statement")}
    unsaid = Reported(result_of(job, rounds)).document()["sites"]
    assert {(row["epsilon"], row["basis"]) for row in unsaid} == {("inf", "nothing")}
    targeted = {**statements, "site-1": signed(job, "site-1", ALL, **{**unprotected, "target_epsilon": "8.0"})}
    assert (
        "site-1 states a target"
        in Reported(result_of(job, rounds, statements=targeted)).document()["unstated"]["site-1"]
    )
    assert "Nothing protects the records behind it." in made["trust_model"][1]["what"]
    assert checks(reported)


def test_deltas_that_add_up_to_everything_promise_nothing() -> None:
    job = shared_job(records={**RECORDS, "target_delta": 0.4})
    made = Reported(result_of(job, [took_part(r, dict.fromkeys(names(3), UPDATE)) for r in ALL])).document()
    assert (made["guarantee"]["records"]["epsilon"], made["guarantee"]["records"]["delta"]) == ("inf", "1")
    assert made["guarantee"]["sentence"] == "At so large a delta, nothing is promised about any record."


def test_where_sites_are_protected_nothing_tells_who_took_part() -> None:
    reported = population()
    made = reported.document()
    assert made["guarantee"]["sites"]["epsilon"] == "2.607"
    assert made["guarantee"]["records"]["epsilon"] == "18"  # the target of each of three sites
    assert "one whole site, with all its records" in made["guarantee"]["sentence"]
    assert (made["statements"], made["unstated"]) == ({}, {})
    assert {made["course"][part] for part in ("members", "left", "silent")} == {None}
    assert {(r["updates"], r["others"]) for r in made["course"]["rounds"]} == {(None, None)}
    assert {(s["membership"], s["statement"], s["rounds_used"]) for s in made["sites"]} == {
        ("not told", "withheld", None)
    }
    found = checks(reported)
    assert "sites epsilon" in found
    assert "sites second accountant" in found


def test_the_coordinators_words_about_sites_are_left_out_where_sites_are_protected() -> None:
    job = shared_job(sites_privacy=SITES)
    told = dict.fromkeys(names(3), UPDATE)
    result = result_of(
        job,
        [took_part(1, told)],
        why="round 2 failed: site-1 was late",
        statements={"site-1": signed(job, "site-1", (1,))},
        unstated={"site-2": "late"},
        members=("site-1",),
        unheard=("site-0", "site-2"),
    )
    facts = Facts.of(result, writer="0", site_level_report=site_level_forge(job).sign())
    assert "site-1" not in json.dumps(facts.model_dump(mode="json", exclude={"job", "job_json", "site_level_report"}))


def test_masking_is_stated_with_its_threshold_and_its_error() -> None:
    made = honest(masking=MASKING).document()
    assert made["masking"] == {
        "threshold": 3,
        "sites_in_league": 1,
        "clip": "0.25",
        "bits": 20,
        "quantisation_error": made["masking"]["quantisation_error"],
    }
    step = 0.25 / (2**19 - 1)  # of the grid: half of it is the most that rounding moves
    assert step / 2 <= float(made["masking"]["quantisation_error"]) <= step / 2 * (1 + 1e-6)
    assert "the sum of the updates of a round" in made["trust_model"][1]["what"]
    assert "masked updates" in made["trust_model"][2]["what"]
    assert "single" not in made["trust_model"][1]["what"]


def test_a_round_that_was_lost_under_masks_counts_for_nobody() -> None:
    job = shared_job(masking=MASKING)
    answers = dict.fromkeys(names(3), UPDATE)
    rounds = [took_part(1, answers), took_part(2, answers, skipped="its sum was lost"), took_part(3, answers)]
    reported = Reported(result_of(job, rounds, statements={s: signed(job, s, ALL) for s in names(3)}))
    assert [s["rounds_used"] for s in reported.document()["sites"]] == [2, 2, 2]
    assert any("the updates of rounds 2 were lost" in v.shows for v in reported.verdicts())


def test_a_job_that_failed_early_is_reported_as_such() -> None:
    job = shared_job()
    rounds = [took_part(1, dict.fromkeys(names(3), UPDATE))]
    statements = {s: signed(job, s, (1, 2) if s == "site-0" else (1,)) for s in names(3)}
    reported = Reported(result_of(job, rounds, statements=statements))
    assert any("1 of 3 rounds released" in v.shows for v in reported.verdicts())
    none = Reported(result_of(job, [], statements={}, members=(), unheard=tuple(names(3))))
    assert none.document()["model"]["weights_digest"] == job.adapter_digest
    assert checks(none)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"epsilon": "1.00"}, "the steps that it discloses cost 3.027"),
        ({"rounds": (1, 2)}, "the report has an update of site-1 in round 3"),
        ({"job": "0" * 64}, "is on another job"),
        ({"log_origin": "tg-tinker/" + "0" * 32}, "names another log"),
    ],
)
def test_a_site_that_states_nonsense_counts_as_missing_and_stops_nobody(changes: dict[str, Any], why: str) -> None:
    reported = honest()
    statements = {**reported.result.statements, "site-1": signed(reported.result.job, "site-1", ALL, **changes)}
    reported.result = reported.result.model_copy(update={"statements": statements})
    made = reported.document()
    assert why in made["unstated"]["site-1"]
    assert made["guarantee"]["records"]["epsilon"] == "12.06"  # 3.03 twice, and 6
    assert checks(reported)


@given(st.decimals(0, 10**6, allow_nan=False, places=9))
def test_numbers_are_never_rounded_down(value: Decimal) -> None:
    shown = Decimal(epsilon_text(value))
    assert value <= shown < value + Decimal("0.001")
    if value:
        assert value <= Decimal(delta_text(value)) <= value * Decimal("1.00001")


def test_the_ledger_of_sites_has_the_name_that_the_mechanism_charges() -> None:
    job = shared_job(sites_privacy=SITES)
    assert SiteMechanism(None, job).dataset_id == ledger_of(job)  # type: ignore[arg-type]


# Writing.


def test_a_report_is_written_with_its_page_and_can_be_written_again(tmp_path: Path) -> None:
    reported = uneven()
    for _ in range(2):
        written = write_report(reported.result, COORDINATOR, tmp_path / "new")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "federation-report.html",
        "federation-report.json",
    ]
    assert written.verifier_key == coordinator_key(COORDINATOR.public_key()).text
    assert verify(written.report.read_bytes())[-1] == written.verdicts[-1]
    assert "e<sup>17.8</sup>" in written.page.read_text()
    assert "exp(17.8)" in written.sentence


def test_nothing_is_written_that_would_not_verify(tmp_path: Path) -> None:
    reported, folder = honest(), tmp_path / "out"
    job = shared_job(sites_privacy=SITES)
    with pytest.raises(InvalidRequestError, match="not the key of the job's coordinator"):
        write_report(reported.result, key_of("site-0"), folder)
    with pytest.raises(InvalidRequestError, match="no report on their ledger belongs to it"):
        write_report(reported.result, COORDINATOR, folder, site_level_report=b"{}")
    with pytest.raises(InvalidRequestError, match=f"privacy report {ledger_of(job)}"):
        write_report(population().result, COORDINATOR, folder)
    for nonsense in (b"", b"[]", b"{}", b"\xff"):
        with pytest.raises(InvalidRequestError, match=r"no privacy report|not a signed report"):
            write_report(population().result, COORDINATOR, folder, site_level_report=nonsense)
    contradiction = reported.result.model_copy(update={"members": ("site-0",)})
    with pytest.raises(InvalidRequestError, match=r"^course: its members"):
        write_report(contradiction, COORDINATOR, folder)
    assert not folder.exists()


def test_whoever_can_check_a_federation_report_can_check_the_reports_inside() -> None:
    code = (
        "from tg_tinker.federated import report_verify\n"
        "from tg_tinker.reports.verdicts import REGISTRY\n"
        "print(*sorted(REGISTRY.checks))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert {PAYLOAD_TYPE, PRIVACY_REPORT} <= set(done.stdout.split())

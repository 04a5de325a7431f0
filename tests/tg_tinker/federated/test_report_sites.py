"""What a report says of whole sites follows from their ledger; a site's own report is held against its statement."""

from __future__ import annotations

import copy
import json
import re
from base64 import b64decode
from typing import Any

import pytest
import rfc8785

from tests.tg_tinker.federated.reported import (
    ALL,
    SITES,
    Edit,
    Reported,
    honest,
    lied,
    population,
    refusal,
    shared_job,
    signed,
    site_forge,
    site_level_forge,
    site_report,
)
from tg_tinker.federated.statement import Accounting
from tg_tinker.transparency.note import VerifierKey, sign_note

# Lies about whole sites.

OTHER_NOISE = {"kind": "sampled_gaussian", "noise_multiplier": "0.9", "sample_rate": "0.1", "vouched_by": "client"}
OTHER_RATE = {"kind": "sampled_gaussian", "noise_multiplier": "1.0", "sample_rate": "0.01", "vouched_by": "client"}
LEDGER_LIES = [
    ("of other sites", {"dataset_id": "federation-sites:" + "0" * 64}, r"^sites: the dataset of the report"),
    ("records instead of sites", {"unit": "datum"}, r"^sites: the unit of the report"),
    ("at another delta", {"delta": "0.001"}, r"^sites: the delta of the report"),
    ("under another target", {"target": "50.0"}, r"^sites: the target of the report"),
    ("too few charges", {"charges": 2}, r"^sites: 3 rounds were released, and 2 were charged"),
    (
        "less noise",
        {"event": OTHER_NOISE},
        r"^sites: 3 rounds were released, and 0 were charged with the noise",
    ),
    (
        "a rarer draw",
        {"event": OTHER_RATE},
        r"^sites: 3 rounds were released, and 0 were charged with the noise",
    ),
]


@pytest.mark.parametrize(("ledger", "why"), [lie[1:] for lie in LEDGER_LIES], ids=[lie[0] for lie in LEDGER_LIES])
def test_a_ledger_of_sites_that_is_not_the_jobs_is_refused(ledger: dict[str, Any], why: str) -> None:
    assert re.search(why, refusal(population(**ledger).sign()))


def test_more_charges_than_rounds_are_fine_since_a_lost_round_is_paid() -> None:
    assert any("4 charges for 3 released rounds" in v.shows for v in population(charges=4).verdicts())


SITE_LIES: list[tuple[str, Edit, str]] = [
    ("understated", lambda d: d["guarantee"]["sites"].update(epsilon="1"), r"^guarantee: guarantee.sites.epsilon is"),
    ("no report", lambda d: d.update(site_level_report=None), r"^sites: .* is missing"),
    ("who took part", lambda d: d["course"].update(members=[]), r"^course: it tells who took part"),
    ("who was drawn", lambda d: d["course"]["rounds"][0].update(updates=["site-0"]), r"^course: it tells who took p"),
    ("why, with names", lambda d: d["course"].update(status="failed", why="site-0", rounds=[]), r"^course: it tells"),
    (
        "a statement",
        lambda d: d["statements"].update({"site-0": signed(shared_job(sites_privacy=SITES), "site-0", ALL)}),
        r"^statement: it has statements of sites",
    ),
    ("a gap", lambda d: d["unstated"].update({"site-0": ""}), r"^statement: it has statements of sites"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "why"), [lie[1:] for lie in SITE_LIES], ids=[lie[0] for lie in SITE_LIES])
def test_a_lie_about_whole_sites_is_named(edit: Edit, why: str) -> None:
    found = refusal(lied(population, edit))
    assert re.search(why, found), found


def test_an_understated_ledger_of_sites_is_refused_by_its_own_entries() -> None:
    """The report inside is signed anew with the real key of the coordinator's log; epsilon follows from entries."""
    job = shared_job(sites_privacy=SITES)
    forge = site_level_forge(job)
    inner = forge.document()
    inner["guarantee"]["epsilon"] = "1.0"
    reported = population()
    reported.level = forge.sign(inner)
    assert re.search(r"^guarantee: guarantee.epsilon is '1.0'", refusal(reported.sign()))


def test_a_report_that_no_log_signed_is_none() -> None:
    def stranger(d: dict[str, Any]) -> None:
        payload = json.loads(b64decode(d["site_level_report"]["payload"]))
        key = VerifierKey("somebody", VerifierKey.parse(payload["integrity"]["verifier_key"]).public_key)
        payload["integrity"]["verifier_key"] = key.text
        from tg_tinker.transparency._encoding import to_base64

        d["site_level_report"]["payload"] = to_base64(rfc8785.dumps(payload))

    assert refusal(lied(population, stranger)).startswith(
        "sites: the report on the sites' ledger is no privacy report"
    )


# A site's full report beside it.


def stating(site: str, **changes: Any) -> Reported:
    """A report that follows from what a site states, true or not."""
    reported = honest()
    statements = {**reported.result.statements, site: signed(reported.result.job, site, ALL, **changes)}
    reported.result = reported.result.model_copy(update={"statements": statements})
    assert reported.document()["unstated"] == {}
    return reported


def test_a_sites_full_report_is_held_against_its_statement() -> None:
    reported = honest()
    reported.beside = [site_report("site-2", 6), site_report("site-0", 6)]
    found = [v.check for v in reported.verdicts()]
    assert found.count("site report") == 2
    assert "site-2 second accountant" in found
    assert "site-1 second accountant" not in found
    assert refusal(reported.sign(), site_report("site-1", 4)).startswith("site report: no site's statement is about")
    assert refusal(reported.sign(), b"{}").startswith("site report: no site's statement is about")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"epsilon": "3.02", "dataset_epsilon": "3.02", "accounting": None},
            "states dataset_epsilon '3.02', and its",
        ),
        ({"dataset_target_epsilon": "7.0"}, "states dataset_target_epsilon"),
        ({"dataset_delta": "1e-06"}, "states dataset_delta"),
        ({"epsilon": "2.99", "accounting": None}, "any 6 steps in its report cost at least 3.027"),
        (
            {"epsilon": "3.03", "accounting": Accounting(noise_multiplier="2.0", sample_rate="0.1", steps=6)},
            "took 6 steps, and its report has 0 that fit",
        ),
    ],
)
def test_a_statement_that_its_own_report_contradicts_is_refused(changes: dict[str, Any], why: str) -> None:
    found = refusal(stating("site-1", **changes).sign(), site_report("site-1", 6))
    assert found.startswith("site report: site-1")
    assert why in found


def test_a_report_of_another_moment_is_refused() -> None:
    forge = site_forge("site-1", 6)
    body = f"{forge.key.name}\n3\n{'A' * 43}=\n"
    note = sign_note(body, forge.key, forge.secret.sign)
    lie = stating("site-1", log_checkpoint=note).sign()
    assert "of another log, or of another moment" in refusal(lie, site_report("site-1", 6))


def test_a_damaged_full_report_is_refused_by_its_own_checks() -> None:
    import hashlib

    forge = copy.copy(site_forge("site-1", 6))
    inner = forge.document()
    inner["guarantee"]["sentence"] = "Nothing can leak."
    data = forge.sign(inner)
    lie = stating("site-1", report_sha256=hashlib.sha256(data).hexdigest()).sign()
    assert refusal(lie, data).startswith("guarantee: guarantee.sentence")

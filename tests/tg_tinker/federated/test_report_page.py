"""The page of a federation report says what the report says, and nothing in a report can act on it."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import Any

import pytest

from tests.tg_tinker.federated.jobs import names
from tests.tg_tinker.federated.reported import (
    MASKING,
    RECORDS,
    UPDATE,
    Reported,
    honest,
    population,
    result_of,
    shared_job,
    signed,
    took_part,
    uneven,
)
from tests.tg_tinker.reports.test_page import HOSTILE, Page
from tg_tinker.errors import InvalidRequestError
from tg_tinker.federated.report_grid import MOST_ROUNDS, MOST_SITES, participation
from tg_tinker.federated.report_page import render


def page_of(reported: Reported) -> Page:
    return Page(render(reported.document()))


def marks(page: Page) -> list[str | None]:
    """What the grid has in its cells, row by column, without the legend's."""
    cells = [a for t, a in page.elements if t in ("rect", "circle", "path")]
    place = [float(re.findall(r"[0-9.]+", str(a.get("x") or a.get("cx") or a["d"]))[0]) for a in cells]
    return [a["class"] for a, x in zip(cells, place, strict=True) if x > 20]


def test_the_first_screen_is_the_sentence_the_budget_and_what_it_means() -> None:
    apart = honest(records={**RECORDS, "people": "disjoint"})
    page = page_of(apart)
    text = page.text
    assert text.index("Adding or removing one record") < text.index("ε = 3.03") < text.index("Sites")
    bar = next(a["style"] for t, a in page.elements if t == "i")
    assert bar == f"width:{100 * 3.03 / 6:.2f}%"
    odds = math.exp(3.03)
    sure = float(re.search(r"at most ([0-9.]+) % sure", text)[1])  # type: ignore[index]
    assert 100 * odds / (1 + odds) <= sure < 100 * odds / (1 + odds) + 0.1
    assert "50 % of what the job allows ε = 6" in text
    assert "ε = 18" in page_of(honest()).text  # the sum over three sites may be so much


def test_every_site_and_every_claim_is_on_the_page() -> None:
    reported = uneven()
    made, page = reported.document(), page_of(reported)
    for line in [*made["coverage"]["covered"], *made["coverage"]["not_covered"]]:
        assert line in page.text
    for row in made["trust_model"]:
        assert row["what"] in page.text
    for row in made["sites"]:
        assert row["public_key"] in page.text
    assert "site-0 3.03 3 3 3.03 of 8.0 signed" in page.text
    assert "site-1 up to 6 – 2 not told missing no reply in time" in page.text
    assert "site-2 refused (policy): “<b>not</b> any more”" in page.text
    assert "site-3 never said a word" in page.text
    assert "2 of 4 sites gave no signed statement" in page.text
    assert made["integrity"]["verifier_key"] in page.text
    assert made["job_digest"] in page.text
    assert made["model"]["weights_digest"] in page.text
    assert "2 statements, each with its site’s signature" in page.text


def test_a_site_over_its_target_and_the_budget_it_breaks_are_marked() -> None:
    job = shared_job(records={**RECORDS, "people": "disjoint"})
    rounds = [took_part(r, dict.fromkeys(names(3), UPDATE)) for r in (1, 2, 3)]
    more = {"accounting": None, "epsilon": "7.50", "dataset_epsilon": "7.50"}
    statements = {s: signed(job, s, (1, 2, 3), **(more if s == "site-1" else {})) for s in names(3)}
    page = page_of(Reported(result_of(job, rounds, statements=statements)))
    assert "these spent more than the job allowed: site-1." in page.text
    assert "125 % of what the job allows" in page.text
    bars = [(a["class"], s["style"]) for (t, a), (_, s) in pairwise(page.elements) if "bar" in str(a.get("class"))]
    assert bars == [
        ("bar over-limit", "width:100.00%"),
        ("bar", "width:50.5%"),
        ("bar over-limit", "width:100.0%"),
        ("bar", "width:50.5%"),
    ]
    assert "more than the job allowed" not in page_of(honest()).text


def test_the_grid_has_a_mark_for_each_site_and_round() -> None:
    used, none, idle = "used", "none", "idle"
    assert marks(page_of(uneven())) == [used, used, used, idle, used, none, used, idle, used, used, none, idle]
    job = shared_job(masking=MASKING)
    lost = [took_part(r, dict.fromkeys(names(3), UPDATE), skipped="lost" if r == 2 else "") for r in (1, 2, 3)]
    page = page_of(Reported(result_of(job, lost)))
    assert marks(page) == [used] * 3 + ["lost"] * 3 + [used] * 3
    assert "it sent an update, and the round’s sum was lost" in page.text


def test_of_very_many_sites_and_rounds_some_are_drawn_and_it_says_so() -> None:
    sites = [f"site-{i}" for i in range(500)]
    rounds = [{"round": r, "updates": sites[:250], "others": {}, "skipped": ""} for r in range(1, 1001)]
    grid = participation({"rounds": rounds, "members": sites}, sites)
    assert len(grid) < 1_000_000
    page = Page(grid)
    assert len(marks(page)) == MOST_SITES * MOST_ROUNDS
    assert f"{MOST_SITES} of 500 sites and {MOST_ROUNDS} of 1,000 rounds are drawn" in page.text
    assert all(0 <= float(a["x"] or 0) <= 800 for t, a in page.elements if t in ("rect", "text"))
    for last in ("site-0", "site-499", "1000"):
        assert last in page.text


def test_whole_sites_have_a_budget_of_their_own_and_no_grid() -> None:
    page = page_of(population())
    assert "ε = 2.607" in page.text
    assert "add or remove one whole site" in page.text
    assert "would tell who was drawn" in page.text
    assert marks(page) == []
    assert "the report on the sites’ ledger, from its entries" in page.text
    assert "gave no signed statement" not in page.text


def test_masking_failure_and_nothing_protected_are_said() -> None:
    assert "which moves one of the mean by at most 2.38" in page_of(honest(masking=MASKING)).text
    job = shared_job(records=None)
    page = page_of(Reported(result_of(job, [took_part(1, dict.fromkeys(names(3), UPDATE))])))
    assert "The job ended early, after 1 of 3 rounds" in page.text
    assert "why the job ended too few sites" in page.text
    assert "ε = ∞" in page.text
    assert "No site protected its records" in page.text
    empty = page_of(Reported(result_of(job, [], members=(), unheard=tuple(names(3)))))
    assert "No round was released" in empty.text


def poisoned(value: Any) -> Any:
    """The same with every text hostile, but for what the page computes with."""
    if isinstance(value, dict):
        return {k: poisoned(v) for k, v in value.items()}
    if isinstance(value, list):
        return [poisoned(v) for v in value]
    number = isinstance(value, str) and re.fullmatch(r"[0-9.e+-]+|inf", value)
    known = value in ("max", "sum", "datum", "target", "tg-tinker/federation-report/v1")
    return value if not isinstance(value, str) or number or known else HOSTILE


def test_what_stands_in_a_report_stays_text() -> None:
    honest_page, made = page_of(uneven()), poisoned(uneven().document())
    made["course"]["left"] = {HOSTILE: made["course"]["left"]["site-2"]}
    for r in made["course"]["rounds"]:
        r["others"] = {HOSTILE: {}}
    page = Page(render(made))
    assert {t for t, _ in page.elements} <= {t for t, _ in honest_page.elements}
    assert not {"script", "img", "iframe", "object", "form", "a", "link"} & {t for t, _ in page.elements}
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("href", "src")]
    shown = HOSTILE.replace("\u202e", "\ufffd").replace("\x00", "\ufffd").replace("\x1b", "\ufffd")
    assert page.text.count(shown) >= 20
    assert not re.search("[\u202e\x00\x1b]", render(made))


def test_nothing_is_fetched_and_no_script_may_run() -> None:
    page = render(uneven().document())
    assert "default-src 'none'; style-src 'unsafe-inline'" in page
    assert not re.search(r"https?:|url\(|@import|<script", page)


def test_what_is_no_report_makes_no_page() -> None:
    with pytest.raises(InvalidRequestError, match="not a report of format"):
        render({"format": "tg-tinker/privacy-report/v2"})
    for section in ("guarantee", "sites", "course", "job"):
        with pytest.raises(InvalidRequestError, match="lacks what its format promises"):
            render({**uneven().document(), section: None})

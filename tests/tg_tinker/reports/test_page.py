"""The page says what the report says, and nothing that stands in a report can act on it."""

from __future__ import annotations

import copy
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest

from tests.tg_tinker.reports.conftest import EVENT, Forge, settled_forge
from tg_tinker.errors import InvalidRequestError
from tg_tinker.reports.page import render
from tg_tinker.reports.statement import rounded_up, thinned

HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(1)>'\u202e&lt;\x00\x1b[31m"
EMPTY = {"meta", "br", "line", "circle", "polyline"}


class Page(HTMLParser):
    """Elements and attributes of a page, and its text; fails on tags that do not close."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in EMPTY:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def report_of(forge: Forge) -> dict[str, Any]:
    return forge.close().document()


def test_the_first_screen_is_the_sentence_the_budget_and_the_curve(forge: Forge) -> None:
    report = report_of(forge)
    page = Page(render(report))
    spent = float(report["guarantee"]["epsilon"])
    assert page.text.index("Adding or removing one record") < page.text.index("ε = 2.903") < page.text.index("Runs")
    assert rounded_up(spent) == "2.903"
    (bar,) = (a["style"] for t, a in page.elements if t == "i")
    assert bar == f"width:{100 * spent / 8:.2f}%"
    points = next(a["points"] for t, a in page.elements if t == "polyline")
    assert points is not None
    assert len(points.split()) == 6  # nothing spent, then five charges
    odds = math.exp(spent)  # even odds before: so these after, at most
    sure = float(re.search(r"at most ([0-9.]+) % sure", page.text)[1])  # type: ignore[index]
    assert 100 * odds / (1 + odds) <= sure < 100 * odds / (1 + odds) + 0.1


def test_every_figure_and_list_of_the_report_is_on_the_page(forge: Forge) -> None:
    report = report_of(forge.raised("8.0", "9.5"))
    text = Page(render(report)).text
    for line in [*report["coverage"]["covered"], *report["coverage"]["not_covered"], *report["trust_model"]]:
        assert line in text
    for line in [*report["assumptions"], report["sampling"]["claim"], report["empirical_audit"]["note"]]:
        assert line in text
    for line in [report["accounting"]["adaptivity"], report["accounting"]["gate"], report["mechanism"]["name"]]:
        assert line in text
    for point in report["privacy_profile"]:
        assert f"{rounded_up(float(point['rdp']))} {rounded_up(float(point['pld']))}" in text
    assert "run_a 3 2 1 0 the base model run_b 2 1 0 1 the base model" in text
    assert "from ε = 8 to 9.5: “more data”" in text
    assert report["integrity"]["verifier_key"] in text
    for line in report["integrity"]["checkpoint"].split():
        assert line in text
    assert report["prepared"] in text
    assert "5 of 5 releases rest on the client’s word" in text


def test_what_stands_in_a_report_stays_text() -> None:
    forge = Forge(dataset_id=HOSTILE).open(HOSTILE, initial_weights=HOSTILE)
    forge.charge(1, HOSTILE)
    forge.append(
        "raise", seq=2, from_epsilon="8.0", target_epsilon="9.0", reason=HOSTILE, actor=HOSTILE, request_id=""
    )
    report = report_of(forge)
    report["server_version"] = report["empirical_audit"]["status"] = report["empirical_audit"]["note"] = HOSTILE
    report["guarantee"]["privacy_unit"] = report["prepared"] = report["time"] = HOSTILE
    plain = Page(render(report_of(settled_forge().raised("8.0", "9.0"))))
    page = Page(render(report))
    assert {t for t, _ in page.elements} <= {t for t, _ in plain.elements}
    assert not {"script", "img", "iframe", "object", "form", "a", "link"} & {t for t, _ in page.elements}
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("href", "src")]
    shown = HOSTILE.replace("\u202e", "\ufffd").replace("\x00", "\ufffd").replace("\x1b", "\ufffd")
    assert page.text.count(shown) >= 8
    assert not re.search("[\u202e\x00\x1b]", render(report))


def test_nothing_is_fetched_and_no_script_may_run(forge: Forge) -> None:
    page = render(report_of(forge))
    assert "default-src 'none'; style-src 'unsafe-inline'" in page
    assert not re.search(r"https?:|url\(|@import|<script", page)


def test_without_a_budget_or_noise_or_release_the_page_says_so() -> None:
    empty = Page(render(report_of(Forge().open()))).text
    assert "ε = 0.000" in empty
    assert "Nothing was released, so there is no curve" in empty
    assert "at most 50 % sure" in empty
    forge = Forge(target="inf").open()
    forge.charge(1)
    limitless = Page(render(report_of(forge))).text
    assert "No limit was set" in limitless
    assert "% of the budget" not in limitless
    forge = Forge(target="inf").open()
    forge.charge(1)
    forge.charge(2, event={"kind": "unnoised"})
    endless = Page(render(report_of(forge))).text
    assert "ε = ∞" in endless
    assert "Epsilon is infinite from release 2 of 2 on" in endless
    assert "In other words: nothing limits what can be learnt about one record" in endless
    assert "once a gradient WITHOUT noise" in endless


def audited(forge: Forge, **more: Any) -> Forge:
    result = {
        "schema": "tg-tinker/empirical-audit/v1", "created": "2026-01-02T03:04:05+00:00", "version": "0.1.0",
        "model": "tiny-llama-2m", "mode": "gradient", "canaries": 200, "claimed_epsilon": "4.0004",
        "claimed_delta": "1e-05", "audited_dataset": "audit-1", "lower_bound": "1.2349", "confidence": "0.95",
        "most_provable": "4.2", "false_alarm_rate": "0.001", "checks": 12, "alarms": [],
        "digest": "sha256:" + 64 * "0",
    }  # fmt: skip
    forge.append("audit", seq=len(forge.chain), actor="key_9", result={**result, **more})
    return forge


def test_an_audit_is_shown_beside_what_it_could_have_shown_and_bounds_round_to_the_safe_side(forge: Forge) -> None:
    page = render(report_of(audited(forge)))
    text = Page(page).text
    assert "no alarm" in text
    assert (
        "epsilon of that training is at least 1.234 with 95 % confidence; no more than 4.200 could be shown" in text
    )
    assert "4.001 at δ = 1e-5" in text
    assert "200 canaries, gradient space, model tiny-llama-2m" in text
    assert "raised an alarm" not in text


def test_an_audit_that_raised_an_alarm_is_on_the_first_screen(forge: Forge) -> None:
    text = Page(render(report_of(audited(audited(forge, alarms=["noise scale"]))))).text
    assert "alarm: noise scale" in text
    assert text.index("An empirical audit raised an alarm") < text.index("Runs")


def test_units_and_kinds_of_release_go_by_their_names() -> None:
    forge = Forge().open("r", EVENT)
    forge.charge(1, "r", {"kind": "gaussian", "noise_multiplier": "6.0"})
    forge.charge(2, "r", {"kind": "participation_gaussian", "noise_multiplier": "6.0", "releases": 1})
    text = Page(render(report_of(forge))).text
    assert "Gaussian noise on a sum that any unit may be in, noise multiplier 6" in text
    assert "charged by the growth of the largest number of steps of one unit, noise multiplier 6, growth 1" in text


@pytest.mark.parametrize("broken", ["guarantee", "curve", "coverage", "integrity", "accounting", "format"])
def test_what_is_no_report_makes_no_page(forge: Forge, broken: str) -> None:
    report = report_of(forge)
    for value in (None, {}, [], "x", 3):
        damaged = copy.deepcopy(report)
        damaged[broken] = value
        with pytest.raises(InvalidRequestError, match="report"):
            render(damaged)
    del report[broken]
    with pytest.raises(InvalidRequestError, match="report"):
        render(report)


@pytest.mark.parametrize(("count", "most"), [(1, 500), (500, 500), (501, 500), (10_000, 500), (7, 2)])
def test_a_thinned_curve_keeps_its_ends_and_its_spread(count: int, most: int) -> None:
    kept = thinned(count, most)
    assert kept == sorted(set(kept))
    assert (kept[0], kept[-1]) == (0, count - 1)
    assert len(kept) == min(count, most)
    gaps = [b - a for a, b in pairwise(kept)]
    assert not gaps or max(gaps) - min(gaps) <= 1

"""The page: whole, self-contained, honest about what is private."""

from __future__ import annotations

import dataclasses
import math
import re
from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from tests.server.demo.values import LEDGER, findings
from tg_tinker_server.demo.report import render, small, up
from tg_tinker_server.demo.state import Measured

VOID = {"meta", "link", "br", "hr", "img", "input"}


class _Tags(HTMLParser):
    """Collects what is open, and what is closed out of turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.urls += [value or "" for name, value in attrs if name in ("src", "href", "action")]

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass


def test_the_page_is_well_formed_and_fetches_nothing() -> None:
    page = render(findings())
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.wrong == []
    assert tags.urls == []
    assert "<script" not in page
    assert not re.search(r"url\(|@import|https?://", page)


def test_the_page_says_who_may_see_it_and_that_no_patient_is_in_it() -> None:
    page = " ".join(render(findings()).split())
    assert "Do not hand this page out as it is" in page
    assert "exact, un-noised functions of the training records" in page
    assert "No patient data is in it" in page
    assert "attested by the client" in page


def test_the_page_shows_the_figures_and_hashes() -> None:
    found = findings()
    page = render(found)
    for text in ("400 → 66", "8.000 of 8", "2e-5", found.checkpoint.artifact_id, "AES-256-GCM", LEDGER.head, "7.410"):
        assert text in page, text
    assert page.count("<svg") == 2


def test_the_page_follows_the_reader_s_colours_and_fits_a_phone() -> None:
    page = render(findings())
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_what_a_model_writes_cannot_become_markup() -> None:
    nasty = Measured(perplexity=66.1, samples=("<script>alert(1)</script>", "&amp;", '"', "</td>"))
    page = render(findings(after=nasty))
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_a_template_sign_in_a_sample_is_kept_as_it_is() -> None:
    page = render(findings(after=Measured(perplexity=66.1, samples=("$epsilon", "${x}", "$", "$$"))))
    assert "$epsilon" in page
    assert "${x}" in page


def test_a_checkpoint_that_differs_is_said_so() -> None:
    page = render(findings(reopened_perplexity=70.0, ciphertext_matches=False))
    assert "✗ ANOTHER PERPLEXITY" in page
    assert "✗ ANOTHER HASH" in page


def test_sampling_by_the_server_is_not_called_attested_by_the_client() -> None:
    page = render(findings(ledger=dataclasses.replace(LEDGER, vouched_by="server")))
    assert "attested by the client" not in page


@given(st.floats(min_value=0, max_value=1e6, allow_nan=False), st.integers(min_value=0, max_value=4))
def test_a_shown_epsilon_is_never_below_the_true_one(epsilon: float, digits: int) -> None:
    shown = float(up(epsilon, digits))
    assert shown >= epsilon - 1e-6 * 10.0**-digits * 1.01
    assert shown <= epsilon + 10.0**-digits * 1.01


def test_an_infinite_epsilon_is_shown_as_such() -> None:
    assert up(math.inf) == "inf"
    assert small(2e-5) == "2e-5"

"""The recorded table of the audit: every fault caught, honest runs left alone, both pages made from the figures."""

from __future__ import annotations

import json

import pytest

from benchmarks.audit import INSTRUMENTS, RESULTS, page
from tests.audit.faults import FAULTS
from tests.docs.test_pages import DOCS
from tg_tinker_server.empirical.settings import MODELS

RECORDED = json.loads((RESULTS / "audit.json").read_text())


def test_the_recorded_page_is_made_from_the_recorded_figures() -> None:
    assert (RESULTS / "audit.md").read_text() == page(RECORDED)


def test_the_documentation_shows_the_recorded_tables() -> None:
    shown = (DOCS / "how-empirical-audit-works.md").read_text()
    tables = [line for line in page(RECORDED).splitlines() if line.startswith("| ")]
    assert [line for line in tables if line not in shown] == []


@pytest.mark.parametrize("model", MODELS)
def test_every_fault_was_caught_by_an_instrument(model: str) -> None:
    rows = {r["fault"]: r for r in RECORDED["faults"] if r["model"] == model}
    assert set(rows) == set(FAULTS)
    for row in rows.values():
        assert row["caught"] == any(row[i] for i in INSTRUMENTS)
        assert row["caught"], row["fault"]


def test_honest_bounds_stayed_below_their_claims() -> None:
    assert len(RECORDED["honest"]) == 8
    for row in RECORDED["honest"]:
        assert row["alarms"] == 0
        assert max(row["lower_bounds"]) < row["claimed"]
        assert row["largest_distance"] <= 1.001

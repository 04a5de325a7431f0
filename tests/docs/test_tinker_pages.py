"""The pages on Tinker scripts and private keys say what the code does."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from scripts import make_venv
from tests.docs.snippets import snippets
from tg_tinker_server.gateway.dp_request import DPRequest, model_and_request
from tg_tinker_server.gateway.privacy import ALPHA, PLANNED_STEPS
from tg_tinker_server.service.policy import KeyPolicy

PAGES = Path(__file__).resolve().parents[2] / "docs" / "how-to"
TINKER, KEYS = (PAGES / "tinker.md").read_text(), (PAGES / "private-keys.md").read_text()


def test_the_policy_of_the_page_is_one(tmp_path: Path) -> None:
    (shown,) = re.findall(r"^```toml\n(.*?)^```$", KEYS, re.MULTILINE | re.DOTALL)
    path = tmp_path / "notes.toml"
    path.write_text(shown)
    policy = KeyPolicy.of_toml(path)
    assert (policy.dataset_id, policy.target_epsilon, policy.planned_steps) == ("notes-2026", 4.0, 300)


def test_the_table_of_units_is_what_policies_take() -> None:
    _, *rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", KEYS, re.MULTILINE)
    assert rows == [("datum", "datum"), ("group", "prompt"), ("pair", "adjacent_pair")]
    for unit, unit_of in rows:
        terms = {"dataset_id": "d", "target_epsilon": 1.0, "target_delta": 1e-6}
        KeyPolicy(privacy_unit=unit, unit_of=unit_of, **terms)
        KeyPolicy(privacy_unit=unit, unit_of="ids", **terms)


def test_counted_passes_cost_what_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = (s for s in snippets(PAGES / "private-keys.md") if s.marked)
    snippet.execute({})
    assert capsys.readouterr().out == "300 steps in full: epsilon 30.9; three passes, counted: 2.1\n"


def test_every_suffix_of_the_page_can_be_read() -> None:
    shown = re.findall(r"`(?:model_name=)?[\w/.-]*(:dp-eps[0-9][^`]*)`", TINKER)
    assert len(shown) == 2
    for suffix in shown:
        assert model_and_request("m" + suffix)[0] == "m"


def test_the_page_names_what_an_optimizer_may_say_and_what_is_planned() -> None:
    (paragraph,) = re.findall(r"`dp_adamw` takes\n(.*?)\n\n", TINKER, re.DOTALL)
    named = set(re.findall(r"`(\w+)`", paragraph))
    spoken = {"target_delta": "delta", "planned_steps": "steps"}
    asked = {spoken.get(f.name, f.name) for f in fields(DPRequest)} - {"dataset_size"}
    assert asked <= named
    assert f"**{PLANNED_STEPS} steps**" in TINKER
    assert f"`alpha` is {ALPHA:g}" in TINKER


def test_the_versions_of_the_page_are_those_that_are_tested() -> None:
    newest = re.findall(r'"tinker==([\d.]+)"', (PAGES.parents[1] / "pyproject.toml").read_text())
    (shown,) = re.findall(r"Tested in CI with `tinker` ([\d., and]+),", TINKER)
    assert re.findall(r"\d+\.\d+\.\d+", shown) == [*make_venv.OLDER_SDKS, *newest]
    assert make_venv.COOKBOOK.split("==")[1] in TINKER

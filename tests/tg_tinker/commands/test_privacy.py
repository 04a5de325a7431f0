"""`tg-tinker privacy plan`: one unknown from the others, and back again; text, JSON and a drawing."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from tg_tinker.cli import main
from tg_tinker.commands.privacy import up

GIVEN = {
    "--dataset-size": "20000",
    "--batch-size": "256",
    "--delta": "1e-5",
    "--epsilon": "3",
    "--steps": "200",
    "--noise-multiplier": "0.8",
}


def plan(*more: str, without: str = "", **changed: str) -> tuple[int, str]:
    values = {**GIVEN, **{f"--{k.replace('_', '-')}": v for k, v in changed.items()}}
    options = [word for name, value in values.items() if name != without for word in (name, value)]
    done = CliRunner().invoke(main, ["privacy", "plan", *options, *more])
    return done.exit_code, done.output


def figures(*, without: str, **changed: str) -> dict[str, Any]:
    code, said = plan("--json", without=without, **changed)
    assert code == 0, said
    found: dict[str, Any] = json.loads(said)
    return found


@pytest.mark.parametrize("name", [n for n in GIVEN if n != "--delta"])
def test_each_answer_put_back_keeps_the_target(name: str) -> None:
    field = name[2:].replace("-", "_")
    found = figures(without=name)
    assert found["solved"] == field
    if field == "epsilon":
        back = figures(without="--noise-multiplier", epsilon=str(found["epsilon"]))
        assert back["noise_multiplier"] <= 0.8  # what was given keeps its own epsilon
    else:
        back = figures(without="--epsilon", **{field: str(found[field])})
        assert 0.9 * 3.0 < back["epsilon"] <= 3.0


def test_the_tighter_accountants_stand_below_the_gate_and_the_estimate_is_called_one() -> None:
    found = figures(without="--epsilon", noise_multiplier="1.0", steps="100")
    by = found["epsilon_by"]
    assert by["pld"]["epsilon"] < by["prv"]["epsilon"] < by["rdp"]["epsilon"] == found["epsilon"]
    assert {name: v["bound"] for name, v in by.items()} == {"rdp": True, "prv": True, "pld": True, "gdp": False}
    assert "NOT a bound" in by["gdp"]["note"]


def test_a_plan_too_large_for_prv_still_has_the_gates_answer() -> None:
    found = figures(without="--epsilon", noise_multiplier="0.3", steps="20000")
    assert set(found["epsilon_by"]) == {"rdp", "pld"}
    assert found["epsilon_by"]["pld"]["epsilon"] < found["epsilon"] < math.inf


def test_the_page_fits_80_columns_and_has_no_colour_in_a_pipe() -> None:
    options = ["--sampling", "none", "--delta", "1e-5", "--epsilon", "4.2", "--noise-multiplier", "6"]
    page = CliRunner().invoke(main, ["privacy", "plan", *options]).output
    assert max(len(line) for line in page.splitlines()) <= 80
    assert "\x1b" not in page
    assert "●" in page
    assert "target 4.2" in page
    assert re.search(r"^steps +\d+ +<- solved$", page, re.M)
    assert re.search(r"^gdp .* estimate, NOT a bound$", page, re.M)
    gate = re.findall(r"^(?:rdp|epsilon) +(\S+)", page, re.M)
    assert len(gate) == 2
    assert gate[0] == gate[1] <= "4.2000"


def test_the_drawing_is_a_whole_svg_and_stands_alone(tmp_path: Path) -> None:
    file = tmp_path / "plan.svg"
    code, said = plan("--svg", str(file), without="--noise-multiplier")
    assert code == 0
    assert str(file) in said
    drawing = file.read_text(encoding="utf-8")
    root = ET.fromstring(drawing)
    assert len(root.findall("{http://www.w3.org/2000/svg}polyline")) == 4
    assert "target 3" in drawing
    assert "prefers-color-scheme: dark" in drawing
    assert "http" not in drawing.replace("http://www.w3.org/2000/svg", "")
    code, said = plan("--svg", str(tmp_path / "no" / "folder.svg"), without="--noise-multiplier")
    assert code == 1
    assert "cannot be written" in said


@pytest.mark.parametrize(
    ("changed", "without", "words"),
    [
        ({}, "", "none is missing"),
        ({"epsilon": "-1"}, "--steps", "--epsilon"),
        ({"batch_size": "30000"}, "--steps", "--batch-size 30000 is larger than --dataset-size 20000"),
        ({"epsilon": "0.5", "noise_multiplier": "0.3"}, "--steps", "not one step fits"),
        ({"epsilon": "0.5", "noise_multiplier": "0.3"}, "--batch-size", "not even a batch of one"),
        ({"epsilon": "0.01"}, "--noise-multiplier", "promises no epsilon below 0.1029"),
        ({"participations": "3"}, "--steps", "participations"),
        ({"noise_multiplier": "0.01", "steps": "1000000"}, "--epsilon", "epsilon is infinite"),
    ],
)
def test_a_plan_that_makes_no_sense_says_why(changed: dict[str, str], without: str, words: str) -> None:
    code, said = plan(without=without, **changed)
    assert code != 0
    assert words in said
    assert "Traceback" not in said


def test_two_unknowns_are_named() -> None:
    done = CliRunner().invoke(
        main, ["privacy", "plan", "--epsilon", "3", "--dataset-size", "10", "--batch-size", "2"]
    )
    assert done.exit_code == 1
    assert "missing: --noise-multiplier, steps" in done.output


@given(st.floats(min_value=1e-12, max_value=1e15))
def test_a_bound_in_text_is_never_below_itself(value: float) -> None:
    assert value <= float(up(value)) <= max(1.2 * value, value + 1)


def test_help_and_planning_need_no_server() -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'opacus', 'sqlalchemy', 'dp_accounting', 'scipy', 'tg_tinker_server'):\n"
        "    sys.modules[name] = None\n"
        "from tg_tinker.cli import main\n"
        "main(['privacy', 'plan', '--sampling', 'none', '--delta', '1e-5', '--epsilon', '8', '--steps', '10'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^rdp +7\.", done.stdout, re.M) or re.search(r"^rdp +8\.0000", done.stdout, re.M)
    assert not re.search(r"^(prv|pld) ", done.stdout, re.M)

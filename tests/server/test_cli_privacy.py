"""`tg-tinker privacy plan`: noise, steps or epsilon from the other two, and back again."""

from __future__ import annotations

import re

import pytest
from click.testing import CliRunner

from tg_tinker.cli import main

SIZES = ["--dataset-size", "20000", "--batch-size", "256", "--delta", "1e-5"]


def plan(*options: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["privacy", "plan", *SIZES, *options])
    return done.exit_code, done.output


def number(name: str, text: str) -> float:
    found = re.search(rf"{name} (\S+)", text)
    assert found, text
    return float(found[1])


def test_a_plan_goes_to_noise_and_back_to_steps_and_epsilon() -> None:
    code, said = plan("--epsilon", "3", "--steps", "200")
    assert code == 0
    sigma = number("noise_multiplier", said)
    assert 2.99 < number("epsilon", said) <= 3.0
    code, back = plan("--noise-multiplier", f"{sigma}", "--steps", "200")
    assert code == 0
    assert number("epsilon", back) == number("epsilon", said)
    code, steps = plan("--noise-multiplier", f"{sigma}", "--epsilon", "3")
    assert code == 0
    assert 200 <= number("steps", steps) <= 201


def test_the_tighter_accountants_stand_below_the_gate() -> None:
    _, said = plan("--noise-multiplier", "1.0", "--steps", "100")
    rdp, prv, pld = (float(x) for x in re.findall(r"^epsilon (\S+)", said, re.M))
    assert pld < prv < rdp


def test_a_plan_too_large_for_them_still_has_the_gates_answer() -> None:
    code, said = plan("--noise-multiplier", "0.05", "--steps", "100000")
    assert code == 0
    assert "the gate" in said
    assert "prv" not in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "exactly two"),
        (("--epsilon", "3"), "exactly two"),
        (("--epsilon", "3", "--steps", "5", "--noise-multiplier", "1"), "exactly two"),
        (("--epsilon", "-1", "--steps", "5"), "--epsilon"),
        (("--epsilon", "3", "--steps", "5", "--batch-size", "30000"), "larger than --dataset-size"),
        (("--epsilon", "0.05", "--noise-multiplier", "0.3"), "not one step fits"),
    ],
)
def test_a_plan_that_makes_no_sense_says_why(options: tuple[str, ...], words: str) -> None:
    code, said = plan(*options)
    assert code != 0
    assert words in said
    assert "Traceback" not in said

"""Plots say what the numbers say, in a drawing and in characters."""

from __future__ import annotations

from itertools import pairwise
from xml.etree import ElementTree as ET

import pytest

from tg_tinker.privacy import Curve
from tg_tinker.privacy.plots import svg_chart, text_chart, ticks

SVG = "{http://www.w3.org/2000/svg}"
LINE = Curve(accountant="rdp", points=((0, 0.0), (50, 4.0), (100, 8.0)), bound=True)
LOWER = Curve(accountant="pld", points=((0, 0.0), (100, 4.0)), bound=True)


def drawn(*curves: Curve, target: float | None = 8.0) -> ET.Element:
    return ET.fromstring(svg_chart(curves, target=target, delta=1e-5))


def test_points_lie_where_their_values_say() -> None:
    root = drawn(LINE, LOWER)
    lines = {e.get("class"): e.get("points", "").split() for e in root.findall(f"{SVG}polyline")}
    rdp = [tuple(map(float, p.split(","))) for p in lines["rdp"]]
    pld = [tuple(map(float, p.split(","))) for p in lines["pld"]]
    assert rdp[0] == pld[0]
    assert rdp[1][0] - rdp[0][0] == pytest.approx(rdp[2][0] - rdp[1][0], abs=0.11)
    assert rdp[1][1] == pytest.approx(pld[1][1], abs=0.11)  # both 4
    dashed = next(e for e in root.findall(f"{SVG}line") if e.get("class") == "target")
    assert float(dashed.get("y1", "nan")) == pytest.approx(rdp[2][1], abs=0.11)  # both 8


def test_everything_stays_on_the_page_and_names_do_not_cover_each_other() -> None:
    near = [Curve(accountant=a, points=((0, 0.0), (100, 5.0 + i / 100)), bound=True) for i, a in enumerate("abcd")]
    root = drawn(*near, target=None)
    width, height = (float(root.get(k, "0")) for k in ("width", "height"))
    names = [e for e in root.findall(f"{SVG}text") if (e.get("class") or "").startswith("name")]
    at = sorted(float(e.get("y", "nan")) for e in names)
    assert len(at) == 4
    assert all(b - a >= 15 for a, b in pairwise(at))
    for e in root.iter():
        for key, limit in (("x", width), ("x1", width), ("x2", width), ("y", height), ("y1", height), ("y2", height)):
            assert 0 <= float(e.get(key, "0")) <= limit


def test_a_reader_who_cannot_see_it_is_told() -> None:
    said = drawn(LINE).get("aria-label", "")
    assert "delta 1e-05" in said
    assert "rdp, the gate: 8" in said
    assert "target 8" in said


def test_the_characters_rise_to_the_target() -> None:
    rows = text_chart([LINE], target=8.0, width=40, height=9).split("\n")
    marks = [[c for c, ch in enumerate(row) if ch == "●"] for row in rows[:9]]
    assert rows[0].startswith("8 ┤")
    assert "-" in rows[0]
    assert rows[8].startswith("0 ┤")
    columns = [max(m) for m in marks if m]
    assert columns == sorted(columns, reverse=True)
    assert sum(len(m) for m in marks) == 40
    assert "100 steps" in rows[10]
    assert rows[-1] == "● rdp, the gate   - target 8"


def test_the_first_curve_lies_on_top() -> None:
    same = Curve(accountant="pld", points=LINE.points, bound=True)
    assert "×" not in "\n".join(text_chart([LINE, same], target=None).split("\n")[:-1])


@pytest.mark.parametrize("highest", [1e-9, 0.03, 0.999, 1.0, 8.2, 9.99e5])
def test_ticks_cover_the_range_with_few_round_values(highest: float) -> None:
    values = ticks(highest)
    assert values[0] == 0
    assert highest <= values[-1] * (1 + 1e-9)
    assert 3 <= len(values) <= 8

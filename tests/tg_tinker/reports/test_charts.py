"""Charts: the numbers land where they belong."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from tg_tinker.reports.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Chart,
    line_chart,
    log_ticks,
    smoothed,
    ticks,
)

values = st.floats(min_value=-1e6, max_value=1e6, allow_nan=False)


def chart(**changes: object) -> Chart:
    fields: dict[str, object] = {"label": "a", "x_name": "step", "y_name": "loss", "line": [(1, 5.0), (2, 4.0)]}
    return Chart(**{**fields, **changes})  # type: ignore[arg-type]


def vertices(svg: str) -> list[tuple[float, float]]:
    points = re.search(r'<polyline class="line" points="([^"]*)"', svg)
    assert points is not None
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in points[1].split())]


@given(values, values)
def test_ticks_cover_the_range_and_are_few(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    found = ticks(low, high)
    slack = 1e-6 * max(1, abs(low), abs(high))
    assert found[0] <= low + slack
    assert found[-1] >= high - slack
    assert 2 <= len(found) <= 12
    assert found == sorted(set(found))


@given(st.lists(st.tuples(st.integers(1, 500), st.floats(0.01, 1e4)), min_size=1, max_size=60))
def test_every_point_lies_inside_the_frame(points: list[tuple[int, float]]) -> None:
    for x, y in vertices(line_chart(chart(line=sorted(points)))):
        assert LEFT - 0.1 <= x <= WIDTH - RIGHT + 0.1
        assert TOP - 0.1 <= y <= HEIGHT - BOTTOM + 0.1


def test_a_larger_value_stands_higher() -> None:
    (_, first), (_, second) = vertices(line_chart(chart()))
    assert first < second  # SVG counts downwards


def test_the_limit_is_drawn_and_named() -> None:
    svg = line_chart(chart(limit=(8.0, "budget 8")))
    assert 'class="limit"' in svg
    assert "budget 8" in svg


def test_no_steps_draw_no_chart() -> None:
    assert "<svg" not in line_chart(chart(line=[]))


def test_labels_are_escaped() -> None:
    assert '"><b>' not in line_chart(chart(label='"><b>'))


def test_smoothing_keeps_a_constant_and_averages_the_rest() -> None:
    assert smoothed([(i, 2.0) for i in range(5)]) == [(i, 2.0) for i in range(5)]
    assert smoothed([(0, 0.0), (1, 3.0), (2, 9.0)], window=3)[1] == (1, 4.0)


@given(st.floats(1e-3, 1e5), st.floats(1.0, 1e4))
def test_logarithmic_ticks_cover_the_range(low: float, factor: float) -> None:
    found = log_ticks(low, low * factor)
    assert found[0] <= low * (1 + 1e-9)
    assert found[-1] >= low * factor * (1 - 1e-9)
    assert len(found) >= 2
    assert found == sorted(set(found))


def test_on_a_logarithmic_axis_equal_factors_are_equal_heights() -> None:
    (_, high), (_, middle), (_, low) = vertices(
        line_chart(chart(line=[(0, 400.0), (1, 200.0), (2, 100.0)], log=True))
    )
    assert abs((middle - high) - (low - middle)) < 0.11


def test_other_lines_have_their_own_class_and_the_same_axes() -> None:
    svg = line_chart(chart(line=[(0, 4.0), (2, 2.0)], others=[("quiet", [(0, 4.0), (2, 1.0)])]))
    other = re.search(r'<polyline class="line quiet" points="([^"]*)"', svg)
    assert other is not None
    first, last = (pair.split(",") for pair in other[1].split())
    assert [float(v) for v in first] == list(vertices(svg)[0])
    assert float(last[1]) > vertices(svg)[-1][1]  # lower on the page

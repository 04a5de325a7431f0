import xml.etree.ElementTree as ET

import pytest

from benchmarks.plot import Bar, Group, bar_chart, nice_step

SVG = "{http://www.w3.org/2000/svg}"


def chart(*values, **options):
    bars = [Bar(label=f"bar {i}", value=value, text=f"{value}") for i, value in enumerate(values)]
    groups = [Group(head="A", note="a < b & c", bars=bars)]
    return ET.fromstring(bar_chart(groups, title='A "title"', subtitle="s", axis="x", **options))


def test_a_chart_is_one_file_that_any_browser_reads():
    root = chart(1.0, 2.0)
    assert root.tag == SVG + "svg"
    assert not [e for e in root.iter() if any("href" in name for name in e.attrib)]


def test_bars_are_as_long_as_their_values():
    short, long = (float(r.get("width")) for r in chart(1.0, 2.0).iter(SVG + "rect") if r.get("class") == "bar")
    assert long == pytest.approx(2 * short, abs=0.2)


def test_the_reference_is_drawn_where_a_bar_of_that_value_ends():
    root = chart(1.0, 0.3, reference=1.0)
    bar = next(r for r in root.iter(SVG + "rect") if r.get("class") == "bar")
    mark = next(line for line in root.iter(SVG + "line") if line.get("class") == "mark")
    assert float(mark.get("x1")) == pytest.approx(float(bar.get("x")) + float(bar.get("width")), abs=0.2)


@pytest.mark.parametrize(("largest", "step"), [(1.0, 0.2), (2.2, 0.5), (9.0, 2.0), (600.0, 100.0)])
def test_grid_lines_stand_at_round_numbers(largest, step):
    assert nice_step(largest) == pytest.approx(step)

"""Line charts as inline SVG: pure text from numbers, colours left to the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 40, 12, 26, 36

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """What a chart shows.

    Attributes:
        label: read out by screen readers.
        line: drawn connected.
        others: further lines, each with a class of its own for the style sheet.
        dots: drawn as faint single points, e.g. the raw values behind a smoothed line.
        limit: a dashed horizontal line with its name, e.g. the budget.
        zero: whether the vertical axis starts at zero.
        log: whether the vertical axis is logarithmic; all values must be positive then.
        width, height: in units of the picture, which is scaled to the page.
    """

    label: str
    x_name: str
    y_name: str
    line: Points
    others: Sequence[tuple[str, Points]] = ()
    dots: Points = ()
    limit: tuple[float, str] | None = None
    zero: bool = False
    log: bool = False
    width: int = WIDTH
    height: int = HEIGHT


def ticks(low: float, high: float, *, about: int = 5) -> list[float]:
    """Round values covering [low, high], about so many.

    >>> ticks(0.0, 8.2)
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """
    if high - low < 1e-9 * max(1.0, abs(low), abs(high)):
        return [low, low + max(1.0, abs(low) * 1e-3)]
    rough = (high - low) / max(about - 1, 1)
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * 0.75)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round values covering [low, high] for a logarithmic axis.

    >>> log_ticks(76.0, 411.0)
    [50.0, 100.0, 200.0, 500.0]
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1
    steps = [m * 10.0**e for e in range(first, last) for m in (1, 2, 5)]
    below = max(step for step in steps if step <= low * (1 + 1e-9))
    above = min((step for step in steps if step >= high * (1 - 1e-9) and step > below), default=10.0**last)
    return [step for step in steps if below <= step <= above] + ([above] if above not in steps else [])


def smoothed(points: Points, *, window: int = 9) -> list[tuple[float, float]]:
    """Centred moving average over at most ``window`` points, fewer at the ends."""
    half = window // 2
    values = [y for _, y in points]
    means = []
    for i, (x, _) in enumerate(points):
        part = values[max(0, i - half) : i + half + 1]
        means.append((x, sum(part) / len(part)))
    return means


def line_chart(chart: Chart) -> str:
    """The chart as one ``<svg>`` element."""
    everything = [*chart.line, *chart.dots, *(point for _, points in chart.others for point in points)]
    if not everything:
        return '<p class="quiet">Nothing to draw: no steps were taken.</p>'
    xs = [x for x, _ in everything]
    ys = [y for _, y in everything] + ([chart.limit[0]] if chart.limit else []) + ([0.0] if chart.zero else [])
    x_ticks = ticks(min(0.0, *xs), max(xs), about=7)
    y_ticks = log_ticks(min(ys), max(ys)) if chart.log else ticks(min(ys), max(ys))
    scale: Callable[[float], float] = math.log if chart.log else float
    x_low, x_high = x_ticks[0], max(xs)
    y_low, y_high = scale(y_ticks[0]), scale(y_ticks[-1])

    def px(x: float) -> float:
        return LEFT + (x - x_low) / ((x_high - x_low) or 1) * (chart.width - LEFT - RIGHT)

    def py(y: float) -> float:
        return chart.height - BOTTOM - (scale(y) - y_low) / ((y_high - y_low) or 1) * (chart.height - TOP - BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {chart.width} {chart.height}" role="img" aria-label="{escape(chart.label, quote=True)}">',
        *_y_axis(chart, y_ticks, py),
        *_x_axis(chart, [t for t in x_ticks if t <= x_high], px),
        f'<text class="axis" x="{LEFT}" y="{TOP - 12}">{escape(chart.y_name)}</text>',
        f'<text class="axis" x="{chart.width - RIGHT}" y="{chart.height - 4}" text-anchor="end">'
        f"{escape(chart.x_name)}</text>",
    ]
    if chart.limit is not None:
        value, name = chart.limit
        parts.append(
            f'<line class="limit" x1="{LEFT}" x2="{chart.width - RIGHT}" y1="{py(value):.1f}" y2="{py(value):.1f}"/>'
            f'<text class="limit-name" x="{LEFT + 10}" y="{py(value) + 16:.1f}">{escape(name)}</text>'
        )
    parts += [f'<circle class="dot" cx="{px(x):.1f}" cy="{py(y):.1f}" r="2.2"/>' for x, y in chart.dots]
    for name, points in [*chart.others, ("", chart.line)]:
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="{" ".join(["line", name]).strip()}" points="{path}"/>')
    if chart.line:
        x, y = chart.line[-1]
        parts.append(f'<circle class="end" cx="{px(x):.1f}" cy="{py(y):.1f}" r="4"/>')
    return "\n".join([*parts, "</svg>"])


def _y_axis(chart: Chart, values: Sequence[float], py: Callable[[float], float]) -> list[str]:
    return [
        f'<line class="grid" x1="{LEFT}" x2="{chart.width - RIGHT}" y1="{py(v):.1f}" y2="{py(v):.1f}"/>'
        f'<text class="tick" x="{LEFT - 8}" y="{py(v) + 4:.1f}" text-anchor="end">{v:g}</text>'
        for v in values
    ]


def _x_axis(chart: Chart, values: Sequence[float], px: Callable[[float], float]) -> list[str]:
    return [
        f'<text class="tick" x="{px(v):.1f}" y="{chart.height - BOTTOM + 16}" text-anchor="middle">{v:g}</text>'
        for v in values
    ]

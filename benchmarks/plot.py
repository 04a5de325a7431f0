"""A horizontal bar chart as one SVG file, readable on light and on dark pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

WIDTH, MARGIN, LABELS = 860, 24, 190
BAR, GAP, GROUP_GAP, HEAD = 15, 6, 22, 24
RIGHT = 64  # room for the figure after the longest bar

STYLE = """
  text { font: 12px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #24292f;
    stroke: #ffffff; stroke-width: 4px; paint-order: stroke; stroke-linejoin: round; }
  .title { font-size: 17px; font-weight: 600; } .head { font-weight: 600; } .quiet { fill: #57606a; }
  .page { fill: #ffffff; } .bar { fill: #a8b1bb; } .own { fill: #0f766e; } .ownlight { fill: #5eaaa3; }
  .base { fill: #d0d7de; } .line { stroke: #d8dee4; } .mark { stroke: #24292f; stroke-dasharray: 4 3; }
  .spread { stroke: #24292f; stroke-width: 1.2; } .strong { font-weight: 600; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; stroke: #0d1117; } .quiet { fill: #9198a1; } .page { fill: #0d1117; }
    .bar { fill: #59636e; } .own { fill: #2dd4bf; } .ownlight { fill: #1f7a70; } .base { fill: #343b43; }
    .line { stroke: #2a3038; } .mark, .spread { stroke: #e6edf3; }
  }
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One bar; ``low`` and ``high`` draw its spread, ``kind`` its colour: bar, own, ownlight or base."""

    label: str
    value: float
    text: str
    low: float | None = None
    high: float | None = None
    kind: str = "bar"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Bars under one heading."""

    head: str
    note: str = ""
    bars: Sequence[Bar] = field(default_factory=tuple)


def nice_step(largest: float, *, ticks: int = 6) -> float:
    """Distance of about ``ticks`` grid lines: 1, 2 or 5 times a power of ten.

    >>> nice_step(2.2)
    0.5
    """
    raw = largest / ticks
    power = 10.0 ** math.floor(math.log10(raw))
    return min((m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999), default=10 * power)


def bar_chart(
    groups: Sequence[Group], *, title: str, subtitle: str, axis: str, reference: float | None = None
) -> str:
    """The SVG text.

    Args:
        groups: from top to bottom.
        axis: what a bar's length is, with its unit.
        reference: where to draw a dashed line through all groups.
    """
    largest = max((bar.high or bar.value for group in groups for bar in group.bars), default=1.0)
    step = nice_step(max(largest, reference or 0.0) or 1.0)
    ticks = math.ceil(max(largest, reference or 0.0) / step)
    scale = (WIDTH - 2 * MARGIN - LABELS - RIGHT) / (ticks * step)
    left = MARGIN + LABELS

    def x(value: float) -> float:
        return round(left + value * scale, 1)

    top = y = MARGIN + 64
    shapes: list[str] = []
    texts: list[str] = []
    for group in groups:
        texts.append(_text(MARGIN, y + 12, group.head, "head"))
        if group.note:
            texts.append(_text(MARGIN + 11 + 7.2 * len(group.head), y + 12, group.note, "quiet"))
        y += HEAD
        for bar in group.bars:
            strong = " strong" if bar.kind == "own" else ""
            texts.append(_text(left - 8, y + BAR - 3, bar.label, f"end{strong}", anchor="end"))
            width = max(1.0, round(bar.value * scale, 1))
            shapes.append(f'<rect class="{bar.kind}" x="{left}" y="{y}" width="{width}" height="{BAR}" rx="2"/>')
            end = bar.value
            if bar.low is not None and bar.high is not None:
                middle, end = y + BAR / 2, max(bar.high, bar.value)
                shapes.append(_line(x(bar.low), middle, x(bar.high), middle, "spread"))
            texts.append(_text(x(end) + 6, y + BAR - 3, bar.text, f"start{strong}"))
            y += BAR + GAP
        y += GROUP_GAP
    y -= GROUP_GAP - 4
    grid = [_line(x(i * step), top - 6, x(i * step), y, "line") for i in range(ticks + 1)]
    texts += [_text(x(i * step), y + 16, f"{i * step:g}", "quiet", anchor="middle") for i in range(ticks + 1)]
    mark = [] if reference is None else [_line(x(reference), top - 6, x(reference), y, "mark")]
    height = y + 46
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(title, {chr(34): "&quot;"})}">',
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{height}" rx="6"/>',
        _text(MARGIN, MARGIN + 12, title, "title"),
        _text(MARGIN, MARGIN + 34, subtitle, "quiet"),
        *grid,
        *shapes,
        *mark,
        *texts,  # last, each on a rim of the page's colour, so that no line runs through them
        _text(left, y + 36, axis, "quiet"),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _text(x: float, y: float, text: str, cls: str, *, anchor: str = "start") -> str:
    return f'<text class="{cls}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, cls: str) -> str:
    return f'<line class="{cls}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>'

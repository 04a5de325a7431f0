"""Curves as pictures: one SVG document for light and dark pages, and characters for a terminal or a pipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from tg_tinker.privacy.curves import Curve

NAMES = {"rdp": "rdp, the gate", "prv": "prv", "pld": "pld", "gdp": "gdp (estimate)"}
MARKS = {"rdp": "●", "prv": "+", "pld": "×", "gdp": "·"}
WIDTH, HEIGHT = 640, 340
LEFT, RIGHT, TOP, BOTTOM = 52, 128, 58, 44

_STYLE = """
  text { font: 12px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #57606a; }
  .title { font-size: 15px; font-weight: 600; fill: #1f2328; } .name { font-weight: 600; }
  .page { fill: #ffffff; } .grid { stroke: #e4e8ec; } .axis { stroke: #8c959f; }
  .target { stroke: #1f2328; stroke-dasharray: 5 4; } .leader { stroke: #afb8c1; }
  polyline { fill: none; stroke-width: 2.2; }
  .rdp { stroke: #0b6bcb; } .prv { stroke: #8250df; } .pld { stroke: #0f766e; }
  .gdp { stroke: #8c959f; stroke-dasharray: 2 4; }
  text.rdp { fill: #0b6bcb; stroke: none; } text.prv { fill: #8250df; stroke: none; }
  text.pld { fill: #0f766e; stroke: none; } text.gdp { fill: #57606a; stroke: none; }
  @media (prefers-color-scheme: dark) {
    text { fill: #9198a1; } .title { fill: #e6edf3; } .page { fill: #0d1117; } .grid { stroke: #21262d; }
    .axis { stroke: #59636e; } .target { stroke: #e6edf3; } .leader { stroke: #3d444d; }
    .rdp { stroke: #58a6ff; } .prv { stroke: #bc8cff; } .pld { stroke: #2dd4bf; } .gdp { stroke: #59636e; }
    text.rdp { fill: #58a6ff; } text.prv { fill: #bc8cff; } text.pld { fill: #2dd4bf; } text.gdp { fill: #9198a1; }
  }
"""


def ticks(highest: float, *, about: int = 5) -> list[float]:
    """Round values from 0 to at least ``highest``, about so many.

    >>> ticks(8.2)
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """
    rough = highest / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.95)
    return [round(i * step, 12) for i in range(math.ceil(highest / step - 1e-9) + 1)]


def _ranges(curves: Sequence[Curve], target: float | None) -> tuple[float, float]:
    """The last step, and the largest epsilon that must be seen."""
    steps = max((n for c in curves for n, _ in c.points), default=1)
    highest = max((e for c in curves for _, e in c.points), default=0.0)
    return float(steps), max(highest, target or 0.0) or 1.0


def svg_chart(curves: Sequence[Curve], *, target: float | None, delta: float) -> str:
    """Epsilon over steps as one SVG document without scripts or outside references.

    Args:
        curves: drawn over each other, the first on top; each is named where it ends.
        target: a dashed line, the budget.
        delta: named in the title.
    """
    last, highest = _ranges(curves, target)
    rows = ticks(highest)
    columns = [t for t in ticks(last) if t <= last and t == int(t)]

    def x(n: float) -> float:
        return round(LEFT + n / last * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - value / rows[-1] * (HEIGHT - TOP - BOTTOM), 1)

    title = f"Epsilon over steps, at delta {delta:.3g}"
    right = WIDTH - RIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="{escape(_in_words(title, curves, target), quote=True)}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="6"/>',
        f'<text class="title" x="{LEFT - 32}" y="26">{escape(title)}</text>',
        *(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y(v)}" y2="{y(v)}"/>' for v in rows[1:]),
        *(f'<text x="{LEFT - 8}" y="{y(v) + 4}" text-anchor="end">{v:g}</text>' for v in rows),
        f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{y(0)}" y2="{y(0)}"/>',
        *(f'<text x="{x(n)}" y="{y(0) + 18}" text-anchor="middle">{count(n)}</text>' for n in columns),
        f'<text x="{right}" y="{HEIGHT - 10}" text-anchor="end">steps</text>',
    ]
    if target is not None:
        parts.append(f'<line class="target" x1="{LEFT}" x2="{right}" y1="{y(target)}" y2="{y(target)}"/>')
        parts.append(f'<text x="{LEFT + 6}" y="{y(target) - 5}">target {target:g}</text>')
    for curve in reversed(curves):
        path = " ".join(f"{x(n)},{y(e)}" for n, e in curve.points)
        parts.append(f'<polyline class="{escape(curve.accountant)}" points="{path}"/>')
    parts += _labels(curves, x, y)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _labels(curves: Sequence[Curve], x: Callable[[float], float], y: Callable[[float], float]) -> list[str]:
    """The names beside the ends of the curves, pushed apart where they would cover each other."""
    parts, above = [], float(TOP - 16)
    for curve in sorted(curves, key=lambda c: -c.points[-1][1]):
        steps, value = curve.points[-1]
        at = max(y(value), above + 16.0)
        above = at
        name = escape(NAMES.get(curve.accountant, curve.accountant))
        kind = escape(curve.accountant)
        parts.append(f'<line class="leader" x1="{x(steps) + 2}" y1="{y(value)}" x2="{x(steps) + 12}" y2="{at}"/>')
        parts.append(f'<text class="name {kind}" x="{x(steps) + 15}" y="{at + 4}">{name}</text>')
    return parts


def _in_words(title: str, curves: Sequence[Curve], target: float | None) -> str:
    ends = [f"{NAMES.get(c.accountant, c.accountant)}: {c.points[-1][1]:.4g}" for c in curves]
    goal = [] if target is None else [f"target {target:g}"]
    return f"{title}. At the end: {'; '.join([*ends, *goal])}."


def count(n: float) -> str:
    """A number of steps, short.

    >>> count(2500), count(1_000_000), count(40)
    ('2.5k', '1M', '40')
    """
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:g}{letter}"
    return f"{n:g}"


def text_chart(curves: Sequence[Curve], *, target: float | None, width: int = 64, height: int = 14) -> str:
    """The same in characters: one mark for each accountant, the first curve on top; ``width`` without the axis.

    A mark stands for a cell of epsilon; lines that run closer together than that hide each other.
    """
    last, highest = _ranges(curves, target)
    rows = ticks(highest)
    cells = [[" "] * width for _ in range(height)]

    def row(value: float) -> int:
        return height - 1 - min(height - 1, round(value / rows[-1] * (height - 1)))

    if target is not None:
        cells[row(target)] = ["-"] * width
    for curve in reversed(curves):
        for column in range(width):
            value = _between(curve, last * (column + 0.5) / width)
            if value is not None:
                cells[row(value)][column] = MARKS.get(curve.accountant, "*")
    labels = {row(v): f"{v:g}" for v in rows}
    margin = max(len(label) for label in labels.values())
    lines = [
        f"{labels.get(i, ''):>{margin}} {'┤' if i in labels else '│'}{''.join(line).rstrip()}"
        for i, line in enumerate(cells)
    ]
    middle, end = count(int(last) // 2), f"{count(int(last))} steps"
    axis = "0" + middle.center(2 * (width // 2 - 1))[: width - 1 - len(end)] + end
    legend = "   ".join(f"{MARKS.get(c.accountant, '*')} {NAMES.get(c.accountant, c.accountant)}" for c in curves)
    goal = "" if target is None else f"   - target {target:g}"
    return "\n".join([*lines, " " * margin + " └" + "─" * width, " " * (margin + 2) + axis, "", legend + goal])


def _between(curve: Curve, steps: float) -> float | None:
    for (a, low), (b, high) in zip(curve.points, curve.points[1:], strict=False):
        if a <= steps <= b:
            return low + (high - low) * (steps - a) / (b - a)
    return None

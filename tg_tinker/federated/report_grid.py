"""Who took part in which round, as inline SVG: a row for each site, a column for each round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from tg_tinker.reports.page import text
from tg_tinker.reports.statement import thinned

MOST_SITES: Final = 60
MOST_ROUNDS: Final = 100
_WIDTH, _LEFT, _TOP, _ROW, _NAME = 800, 150, 22, 22, 20
_LEGEND: Final = {
    "used": "its update is in the model",
    "lost": "it sent an update, and the round’s sum was lost",
    "none": "asked, and no good update came",
    "idle": "not asked",
}


def participation(course: Mapping[str, Any], sites: Sequence[str]) -> str:
    """The grid and its legend, or why there is none. Of many sites or rounds some are shown, evenly spread."""
    rounds = course["rounds"]
    if course["members"] is None:
        return '<p class="quiet">Not told: who took part in a round would tell who was drawn.</p>'
    if not rounds:
        return '<p class="quiet">No round was released.</p>'
    rows = [sites[i] for i in thinned(len(sites), MOST_SITES)]
    columns = [rounds[i] for i in thinned(len(rounds), MOST_ROUNDS)]
    step = min(28.0, (_WIDTH - _LEFT) / len(columns))
    size = min(step, _ROW) * 0.66
    found, seen = [], set()
    for j, column in enumerate(columns):
        x = _LEFT + (j + 0.5) * step
        if j == len(columns) - 1 or (j % max(1, round(26 / step)) == 0 and len(columns) - 1 - j > 30 / step):
            at, anchor = (_WIDTH, "end") if x > _WIDTH - 12 else (x, "middle")
            found.append(f'<text class="tick" x="{at:.1f}" y="14" text-anchor="{anchor}">{column["round"]}</text>')
        for i, site in enumerate(rows):
            kind = _kind(column, site)
            seen.add(kind)
            found.append(_mark(kind, x, _TOP + (i + 0.5) * _ROW, size))
    for i, site in enumerate(rows):
        name = site if len(site) <= _NAME else f"{site[: _NAME - 1]}…"
        found.append(f'<text class="name" x="0" y="{_TOP + (i + 0.5) * _ROW + 4.5:.1f}">{text(name)}</text>')
    height = _TOP + _ROW * len(rows) + 2
    said = f"{len(rows)} sites in {len(columns)} rounds; the table above has how many updates of each were used"
    legend = "".join(
        f'<li><svg viewBox="0 0 12 12" aria-hidden="true">{_mark(kind, 6, 6, 9)}</svg>{text(words)}</li>'
        for kind, words in _LEGEND.items()
        if kind in seen
    )
    left_out = ""
    if len(rows) < len(sites) or len(columns) < len(rounds):
        left_out = (
            f'<p class="quiet">{len(rows)} of {len(sites):,} sites and {len(columns)} of {len(rounds):,} rounds are '
            "drawn, evenly spread; the JSON has all.</p>"
        )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{text(said)}">{"".join(found)}</svg>\n'
        f'<ul class="legend">{legend}</ul>\n{left_out}'
    )


def _kind(record: Mapping[str, Any], site: str) -> str:
    if site in record["updates"]:
        return "lost" if record["skipped"] else "used"
    return "none" if site in record["others"] else "idle"


def _mark(kind: str, x: float, y: float, size: float) -> str:
    """Each kind has a shape of its own, so that no colour is needed to tell them apart."""
    half = size / 2
    corner = f'x="{x - half:.1f}" y="{y - half:.1f}" width="{size:.1f}" height="{size:.1f}" rx="2"'
    if kind in ("used", "lost"):
        return f'<rect class="{kind}" {corner}/>'
    if kind == "idle":
        return f'<circle class="idle" cx="{x:.1f}" cy="{y:.1f}" r="1.8"/>'
    a, b, c, d = x - half * 0.7, x + half * 0.7, y - half * 0.7, y + half * 0.7
    return f'<path class="none" d="M{a:.1f} {c:.1f}L{b:.1f} {d:.1f}M{a:.1f} {d:.1f}L{b:.1f} {c:.1f}"/>'

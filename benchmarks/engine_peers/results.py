"""What was measured of one shape, as it is printed, kept and drawn."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.engine_peers import BASE, CONTENDERS
from benchmarks.engine_peers.timing import Samples
from benchmarks.plot import Bar, Group, bar_chart
from benchmarks.report import Ratio, paired_ratio, print_table

OWN = ("ours-plain", "ours")
COLUMNS = ("", "CPU s/step", "/ PEFT", "wall s/step", "/ PEFT", "tokens/s", "step MiB", "/ PEFT", "off by")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One contender on one shape.

    Attributes:
        off_by: relative difference of its first update to the brute-force loop; ``None`` where not comparable.
        cpu_s, wall_s: medians per optimizer step.
        cpu_ratio, wall_ratio: to the base, paired within rounds.
        tokens_per_s: real tokens by the median wall clock.
        step_bytes: peak memory of a step over what was held before.
    """

    off_by: float | None
    cpu_s: float
    wall_s: float
    cpu_ratio: Ratio
    wall_ratio: Ratio
    tokens_per_s: float
    step_bytes: int | None
    samples: Samples


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeResult:
    """All contenders of one shape.

    Attributes:
        max_grad_norm: C of this shape: the median norm of its records.
        left_out: why a contender has no row.
        private_over_own: our private step over our own without privacy, paired.
        peers_over_ours: each private peer's step over our private one, paired; above 1 we are faster.
    """

    name: str
    description: str
    clock: str
    max_grad_norm: float
    rows: Mapping[str, Row]
    left_out: Mapping[str, str]
    private_over_own: Ratio | None
    peers_over_ours: Mapping[str, Ratio]


def summarize(
    samples: Mapping[str, Samples],
    *,
    off_by: Mapping[str, float | None],
    step_bytes: Mapping[str, int | None],
    tokens: int,
) -> dict[str, Row]:
    """Rows by contender.

    Args:
        tokens: real tokens of one optimizer step.
    """
    base = samples[BASE]
    rows = {}
    for name, taken in samples.items():
        wall_s = statistics.median(taken.wall_s)
        rows[name] = Row(
            off_by=off_by.get(name),
            cpu_s=statistics.median(taken.cpu_s),
            wall_s=wall_s,
            cpu_ratio=paired_ratio(taken.cpu_s, base.cpu_s),
            wall_ratio=paired_ratio(taken.wall_s, base.wall_s),
            tokens_per_s=tokens / wall_s,
            step_bytes=step_bytes.get(name),
            samples=taken,
        )
    return rows


def over(samples: Mapping[str, Samples], name: str, base: str, *, clock: str) -> Ratio | None:
    """A paired ratio of two contenders by the clock that counts, or ``None`` where one is missing."""
    if name not in samples or base not in samples:
        return None
    pair = [s.cpu_s if clock == "cpu" else s.wall_s for s in (samples[name], samples[base])]
    return paired_ratio(pair[0], pair[1])


def show(result: ShapeResult) -> None:
    """Print one shape."""
    base = result.rows[BASE]
    rows = []
    for name, row in result.rows.items():
        mib = row.step_bytes
        rows.append(
            (
                CONTENDERS[name].title,
                f"{row.cpu_s:.3f}",
                row.cpu_ratio,
                f"{row.wall_s:.3f}",
                row.wall_ratio,
                f"{row.tokens_per_s:,.0f}",
                "-" if mib is None else f"{mib / 2**20:,.0f}",
                "-" if mib is None or not base.step_bytes else f"{mib / base.step_bytes:.2f}",
                "-" if row.off_by is None else f"{row.off_by:.0e}",
            )
        )
    print_table(f"{result.name}: {result.description}", COLUMNS, rows)
    for reason in result.left_out.values():
        print(f"  {reason}")
    if result.private_over_own is not None:
        own = result.private_over_own
        print(f"  our private step over our own without privacy: {own.median:.3f} ({own.low:.3f} to {own.high:.3f})")
    if result.peers_over_ours:
        peers = ", ".join(f"{CONTENDERS[name].title} {ratio}" for name, ratio in result.peers_over_ours.items())
        print(f"  private steps over ours: {peers}\n", flush=True)


def time_chart(results: Sequence[ShapeResult], *, where: str) -> str:
    """SVG of step times over plain PEFT."""
    groups = []
    for result in results:
        bars = []
        for name, row in result.rows.items():
            ratio = row.cpu_ratio if result.clock == "cpu" else row.wall_ratio
            bar = Bar(
                label=CONTENDERS[name].title,
                value=ratio.median,
                low=None if name == BASE else ratio.low,
                high=None if name == BASE else ratio.high,
                text=str(ratio),
                kind=_kind(name),
            )
            bars.append(bar)
        groups.append(Group(head=result.name, note=result.description, bars=bars))
    clock = "CPU time" if results[0].clock == "cpu" else "time"
    return bar_chart(
        groups,
        title="One training step, against plain PEFT without privacy",
        subtitle=where,
        axis=f"{clock} per step / that of plain PEFT in the same round: median and quartiles; shorter is faster",
        reference=1.0,
    )


def memory_chart(results: Sequence[ShapeResult], *, where: str) -> str | None:
    """SVG of step memory over plain PEFT, or ``None`` where it was not measured."""
    groups = []
    for result in results:
        base = result.rows[BASE].step_bytes
        bars = [
            Bar(
                label=CONTENDERS[name].title,
                value=row.step_bytes / base,
                text=f"{row.step_bytes / base:.2f}  ({row.step_bytes / 2**20:,.0f} MiB)",
                kind=_kind(name),
            )
            for name, row in result.rows.items()
            if row.step_bytes is not None and base
        ]
        if bars:
            groups.append(Group(head=result.name, note=result.description, bars=bars))
    if not groups:
        return None
    return bar_chart(
        groups,
        title="Memory of one training step, against plain PEFT without privacy",
        subtitle=where,
        axis="peak memory of a step, model left out / that of plain PEFT; shorter is less",
        reference=1.0,
    )


def _kind(name: str) -> str:
    return {BASE: "base", "ours": "own", "ours-plain": "ownlight"}.get(name, "bar")

"""One topic of the service benchmark: its table, and what was required of it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.report import machine, print_table


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """A bound and what was measured against it.

    >>> print(Requirement(what="p95", measured=12.5, limit=20.0, unit="ms"))
    p95: at most 20 ms required, 12.5 measured: met
    """

    what: str
    measured: float
    limit: float
    unit: str
    kind: Literal["at most", "at least"] = "at most"

    @property
    def met(self) -> bool:
        """Whether the measurement is on the right side; NaN never is."""
        return self.measured <= self.limit if self.kind == "at most" else self.measured >= self.limit

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        verdict = "met" if self.met else "not met"
        return f"{self.what}: {self.kind} {self.limit:g}{unit} required, {self.measured:.3g} measured: {verdict}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Topic:
    """What was measured, as it is printed and kept.

    Attributes:
        rows: as in the table, the first column a text.
        notes: what a reader must know to use the figures.
        figures: everything that was measured, in seconds unless its name says otherwise.
        machine: with its load when the measurement ended.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    requirements: Sequence[Requirement] = ()
    notes: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=machine)

    def kept(self) -> dict[str, Any]:
        """As JSON keeps it."""
        required = [
            {"what": r.what, "kind": r.kind, "limit": r.limit, "unit": r.unit, "measured": r.measured, "met": r.met}
            for r in self.requirements
        ]
        return {"title": self.title, "requirements": required, "figures": self.figures, "machine": self.machine}


def show(topic: Topic) -> None:
    """Print one topic, its requirements honestly beside its figures."""
    print_table(topic.title, topic.columns, topic.rows, notes=topic.notes)
    for requirement in topic.requirements:
        print(f"  {requirement}")
    print(f"  load average {', '.join(f'{load:g}' for load in topic.machine['load_average'])}\n", flush=True)


def percentile(values: Sequence[float], percent: int) -> float:
    """The value below which so many percent lie, interpolated.

    >>> percentile([0.0, 1.0, 2.0, 3.0, 4.0], 50)
    2.0
    """
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]

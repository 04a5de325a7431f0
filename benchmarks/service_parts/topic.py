"""One topic of the service benchmark: its table, and what was required of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.report import machine, print_table

FREE = 0.9  # of a core; below it the machine is busy with something else


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


def show(topic: Topic, *, core_share: float) -> None:
    """Print one topic, its requirements honestly beside its figures.

    Args:
        core_share: the smaller of two ``core_share``, before and after the measurement.
    """
    print_table(topic.title, topic.columns, topic.rows, notes=topic.notes)
    for requirement in topic.requirements:
        print(f"  {requirement}")
    load = ", ".join(f"{load:g}" for load in topic.machine["load_average"])
    busy = "; BUSY: what is measured by the clock says little" if core_share < FREE else ""
    print(f"  load average {load}; a busy thread had {core_share:.0%} of a core{busy}\n", flush=True)


def core_share(wall_s: float = 0.3) -> float:
    """The share of a core that a thread gets which never waits: 1 on a machine with nothing else to do."""
    began_s, cpu_s = time.perf_counter(), time.thread_time()
    while time.perf_counter() - began_s < wall_s:
        pass
    return (time.thread_time() - cpu_s) / (time.perf_counter() - began_s)


def percentile(values: Sequence[float], percent: int) -> float:
    """The value below which so many percent lie, interpolated.

    >>> percentile([0.0, 1.0, 2.0, 3.0, 4.0], 50)
    2.0
    """
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]

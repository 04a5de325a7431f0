"""What every benchmark prints and keeps: the machine, paired ratios, a table, a JSON file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import random
import re
import shlex
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """The machine and the moment of a measurement: enough to judge its figures, nothing about who ran it."""
    import torch

    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"-m {module.name.removesuffix('.__main__')}" if module else Path(sys.argv[0]).name
    cuda = torch.cuda.is_available()
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *program.split(), *sys.argv[1:]]),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return " ".join((found[1] if found else platform.processor() or platform.machine()).split())


def machine_slug(facts: Mapping[str, Any], *, device: str = "cpu") -> str:
    """A short name for files: ``intel-xeon-processor-2-cores``, or the GPU's when that was measured."""
    name = facts["gpu"] if device.startswith("cuda") else f"{facts['cpu']} {facts['cores']} cores"
    name = re.sub(r"\((?:r|tm|c)\)|@.*?GHz|\bCPU\b", " ", str(name), flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def results_path(kind: str, facts: Mapping[str, Any], *, device: str = "cpu") -> Path:
    """Where the figures of one benchmark on one machine are kept."""
    return RESULTS / f"{kind}-{machine_slug(facts, device=device)}.json"


def round_orders(names: Sequence[str], *, rounds: int, seed: int = 0) -> Iterator[list[str]]:
    """Each round's order of contenders, shuffled the same way on every machine.

    >>> len(list(round_orders(["a", "b"], rounds=3)))
    3
    """
    rng = random.Random(seed)
    for _ in range(rounds):
        order = list(names)
        rng.shuffle(order)
        yield order


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """A contender over the base: the median of the rounds' own ratios and its quartiles, no unit."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}"


def paired_ratio(samples: Sequence[float], base: Sequence[float]) -> Ratio:
    """Ratio of two contenders measured in the same rounds; whatever slowed a round cancels.

    >>> str(paired_ratio([2.0, 20.0, 6.0], [1.0, 10.0, 2.0]))
    '2.00'
    """
    ratios = [a / b for a, b in zip(samples, base, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return Ratio(median=statistics.median(ratios), low=low, high=high)


def paired_ratios(samples: Mapping[str, Sequence[float]], base: str) -> dict[str, Ratio]:
    """``paired_ratio`` of every contender to ``base``, which must be one of them."""
    return {name: paired_ratio(values, samples[base]) for name, values in samples.items()}


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, notes: str = "") -> None:
    """Print one table; the first column is text, all others are figures."""
    table = Table(box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(str, row))
    # A pipe has no width of its own, and a wrapped figure cannot be read.
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print(title, style="bold", markup=False)
    console.print(table)
    if notes:
        console.print(notes, markup=False)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Keep a measurement, replacing the last one on this machine. Dataclasses become objects."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    return asdict(value) if hasattr(value, "__dataclass_fields__") else str(value)

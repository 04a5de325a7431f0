"""What a ledger of a million entries costs: charging, memory, proofs, a full check, the first look after a start.

``python -m benchmarks.ledger`` builds ledgers of 10,000, 100,000 and 1,000,000 entries with the ledger's own code
(half an hour; ``--folder`` keeps them for the next time) and measures each in a process of its own. Wall times need
free cores and a disk that nobody else flushes; CPU times bear other work.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.ledger_parts.build import copy, extend
from benchmarks.report import machine, print_table, results_path, write_json

SIZES = (10_000, 100_000, 1_000_000)
RESERVE_P99_MS, PROOF_P99_MS = 10.0, 1.0  # required


def build(folder: Path, sizes: list[int]) -> dict[int, Path]:
    """Databases by size; those that are in the folder are taken as they are."""
    grown = folder / "grown.db"
    for size in sizes:
        target = folder / f"{size}.db"
        if not target.exists():
            extend(grown, size, progress=lambda n: print(f"\rbuilt {n:,} entries", end="", flush=True))
            print()
            copy(grown, folder / "half.tmp")
            (folder / "half.tmp").rename(target)
    return {size: folder / f"{size}.db" for size in sizes}


def measure(database: Path, steps: int) -> dict[str, Any]:
    """What :mod:`benchmarks.ledger_parts.measure` saw on a copy."""
    with tempfile.TemporaryDirectory(dir=database.parent) as folder:
        work = Path(folder) / "ledger.db"
        copy(database, work)
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.ledger_parts.measure", str(work), str(steps)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return {**json.loads(done.stdout), "load_average": [round(load, 2) for load in os.getloadavg()]}


def rows(seen: list[dict[str, Any]]) -> list[list[object]]:
    """The table: one figure a row, one size a column."""

    def row(name: str, *path: str) -> list[object]:
        figures: list[object] = [name]
        for one in seen:
            value: Any = one
            for key in path:
                value = value[key]
            figures.append(value)
        return figures

    return [
        row("reserve p50, ms", "reserve", "p50_ms"),
        row(f"reserve p99, ms (required: {RESERVE_P99_MS:g})", "reserve", "p99_ms"),
        row("CPU time of a reserve p50, ms", "reserve_cpu", "p50_ms"),
        row("the same, p99, ms", "reserve_cpu", "p99_ms"),
        row("32 KB flushed by the disk alone, p50, ms", "flush", "p50_ms"),
        row("the same, p99, ms", "flush", "p99_ms"),
        row("memory when opened, MB", "memory_mb", "opened"),
        row("highest memory until the first fold is done, MB", "memory_mb", "peak_of_first_fold"),
        row("memory after the charges, MB", "memory_mb", "after_charges"),
        row("first fold, s", "first_fold_s"),
        row("the same in CPU time, s", "first_fold_cpu_s"),
        row(f"inclusion proof p99, ms (required: {PROOF_P99_MS:g})", "inclusion_proof", "p99_ms"),
        row("CPU time of an inclusion proof p99, ms", "inclusion_proof_cpu", "p99_ms"),
        row("checking it, CPU time p99, ms", "inclusion_check_cpu", "p99_ms"),
        row("consistency proof, CPU time p99, ms", "consistency_proof_cpu", "p99_ms"),
        row("full check of chain and tree, s", "full_check_s"),
        row("the same in CPU time, s", "full_check_cpu_s"),
        row("database, MB", "database_mb"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where ledgers are built, or were")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="numbers of entries, rising")
    parser.add_argument("--steps", type=int, default=1000, help="charges and proofs to time")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        built = build(folder, sorted(asked.sizes))
        facts = machine()
        seen = [measure(path, asked.steps) for path in built.values()]
    write_json(results_path("ledger", facts), {"machine": facts, "ledgers": seen})
    print_table("A ledger by its number of entries", ["", *(f"{one['entries']:,}" for one in seen)], rows(seen))


if __name__ == "__main__":
    main()

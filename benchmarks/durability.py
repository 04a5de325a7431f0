"""What the ledger keeps when processes are killed, the power goes and the disk fails: the long counts.

``python -m benchmarks.durability`` runs the loops of tests/server/ledger in processes of their own and keeps what
they saw. ``make test-slow`` asserts the same; this records the figures. Most of an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import machine, print_table, results_path, write_json

ROOT = Path(__file__).resolve().parents[1]
SEED = "20260102"


def loops(kills: int, cuts: int) -> dict[str, list[str]]:
    """Name of each count -> module and arguments after the folder."""
    return {
        "SIGKILL, one writer": ["kill_loop", str(kills), SEED, "1"],
        "SIGKILL, two writers": ["kill_loop", str(kills), SEED, "2"],
        "power cuts": ["power_cut_loop", str(cuts), SEED, "FULL"],
        "power cuts, control: synchronous=NORMAL": ["power_cut_loop", str(cuts), SEED, "NORMAL"],
        "EIO and ENOSPC on each operation of a charge": ["failing_disk"],
    }


def run(module: str, *arguments: str) -> dict[str, Any]:
    """What one loop saw, and how long it took in seconds.

    Raises:
        subprocess.CalledProcessError: it found something broken; its own error is printed.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", f"tests.server.ledger.{module}", folder, *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return {**json.loads(done.stdout), "seconds": round(time.monotonic() - started, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=2000, help="with one writer, and again with two")
    parser.add_argument("--cuts", type=int, default=1500, help="with flushes, and again without")
    asked = parser.parse_args()
    facts = machine()
    counts = {}
    for name, (module, *arguments) in loops(asked.kills, asked.cuts).items():
        counts[name] = run(module, *arguments)
        figures = ", ".join(f"{key} {value}" for key, value in counts[name].items())
        print(f"{name}: {figures}", flush=True)
    write_json(results_path("durability", facts), {"machine": facts, "counts": counts})
    rows = [
        [name, seen.get("kills", seen.get("cuts", seen.get("faults"))), seen.get("told", "-"), seen.get("lost", "-")]
        for name, seen in counts.items()
    ]
    print_table("Charges reported as paid, and lost", ["what happened", "times", "reported", "lost"], rows)


if __name__ == "__main__":
    main()

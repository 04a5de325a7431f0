"""Federated training measured: what it learns beside lone sites and pooled data, what it costs, what it bears.

    python -m benchmarks.federated quality        about half an hour on two free cores
    python -m benchmarks.federated scale          10, 100, 1,000 simulated sites: time, memory, accounting
    python -m benchmarks.federated poison         two of ten sites send poison
    python -m benchmarks.federated kills          sites and coordinator die at random moments

Each goes on where it was stopped: finished cells are kept in a file in the working folder.

Results are in benchmarks/results/federated.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from benchmarks.federated_parts import kills, poison, quality, scale
from benchmarks.federated_parts.kept import to_json
from benchmarks.report import machine

RESULTS = Path(__file__).parent / "results"
RECORD = RESULTS / "federated.json"
PARTS: dict[str, Any] = {"quality": quality, "scale": scale, "poison": poison, "kills": kills}


def page(document: dict[str, Any]) -> str:
    """The recorded figures as Markdown."""
    lines = ["# Federated training, measured", ""]
    for name, part in document.items():
        facts = part["machine"]
        lines += [f"## {name.capitalize()}", "", f"`{facts['command']}` on {facts['cpu']}, {facts['cores']} cores,"]
        lines += [f"{facts['date'][:10]}.", "", *PARTS[name].page(part["figures"]), ""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--cells", type=Path, help="finished runs, kept  [default: federated-PART-cells.json]")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    figures = to_json(PARTS[options.part].run(options.cells or Path(f"federated-{options.part}-cells.json")))
    document = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    document[options.part] = {"machine": machine(), "figures": figures}
    RECORD.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    RECORD.with_suffix(".md").write_text(page(document), encoding="utf-8")
    print(page(document))


if __name__ == "__main__":
    main()

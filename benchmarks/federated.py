"""Federated training measured: what it learns beside lone sites and pooled data.

    python -m benchmarks.federated quality        about half an hour on two free cores; goes on where it was stopped

Results are in benchmarks/results/federated.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from benchmarks.federated_parts import quality
from benchmarks.report import machine

RESULTS = Path(__file__).parent / "results"
RECORD = RESULTS / "federated.json"
PARTS = ("quality",)


def page(document: dict[str, Any]) -> str:
    """The recorded figures as Markdown."""
    lines = ["# Federated training, measured", ""]
    for name, part in document.items():
        facts = part["machine"]
        lines += [f"## {name.capitalize()}", "", f"`{facts['command']}` on {facts['cpu']}, {facts['cores']} cores,"]
        lines += [f"{facts['date'][:10]}.", "", *quality.page(part["figures"]), ""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--cells", type=Path, default=Path("federated-cells.jsonl"), help="finished runs; kept")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    figures = quality.run(options.cells)
    document = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    document[options.part] = {"machine": machine(), "figures": figures}
    RECORD.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    RECORD.with_suffix(".md").write_text(page(document), encoding="utf-8")
    print(page(document))


if __name__ == "__main__":
    main()

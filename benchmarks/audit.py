"""What the empirical audit catches: every planted fault, and honest runs beside them.

    python -m benchmarks.audit            about twenty minutes on two cores; --quick takes four

Faults are planted in the service's code (tests/audit/faults.py); the audit is the one of `tg-tinker audit run`.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import machine as this_machine
from tests.audit.faults import FAULTS, plant
from tg_tinker_server.empirical.audit import audit
from tg_tinker_server.empirical.bounds import most_provable
from tg_tinker_server.empirical.findings import AuditResult, Finding, Instrument
from tg_tinker_server.empirical.settings import MODELS, AuditSettings, Mode

RESULTS = Path(__file__).parent / "results"
INSTRUMENTS: tuple[Instrument, ...] = ("neighbours", "noise", "draws", "charges", "distinguisher")
POWERS = (20, 200, 1000, 5000)


def main() -> None:
    """Measure, then write JSON and the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one model, two honest runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "audit.json")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    models, repeats = (MODELS[1:], 2) if options.quick else (MODELS, 4)
    document = {
        "machine": this_machine(),
        "power": [{"canaries": m, "most_provable": most_provable(m, delta=1e-5, confidence=0.95)} for m in POWERS],
        "faults": [row for model in models for row in fault_rows(model)],
        "honest": [row for model in models for row in honest_rows(model, repeats)],
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(page(document))
    print(page(document))


def fault_rows(model: str) -> Iterator[dict[str, Any]]:
    """Each fault: what every instrument said."""
    for fault in FAULTS:
        with plant(fault):
            result = audit(AuditSettings(model=model, seed=0))
        yield {
            "model": model,
            "fault": fault,
            "caught": bool(result.alarms),
            "lower_bound": result.bound.epsilon,
            "claimed": result.claim.epsilon,
            "seconds": result.seconds,
            **{i: worst(result, i) for i in INSTRUMENTS},
        }
        print(model, fault, "caught" if result.alarms else "MISSED", f"{result.seconds:.0f} s", flush=True)


def worst(result: AuditResult, instrument: Instrument) -> dict[str, Any] | None:
    """The alarm that is hardest to explain away, ``None`` if the instrument saw nothing."""
    alarms = [f for f in result.alarms if f.instrument == instrument]
    return min(alarms, key=_surprise).to_json() if alarms else None


def _surprise(finding: Finding) -> float:
    return -finding.figure if finding.p_value is None else finding.p_value


def honest_rows(model: str, repeats: int) -> Iterator[dict[str, Any]]:
    """Lower bounds of an untouched service, with fresh canaries, coins and noise each time."""
    wanted: Sequence[tuple[Mode, float]] = [("gradient", 2.0), ("gradient", 4.0), ("gradient", 8.0), ("input", 8.0)]
    for mode, epsilon in wanted:
        runs = [audit(AuditSettings(model=model, mode=mode, epsilon=epsilon, canaries=1000)) for _ in range(repeats)]
        yield {
            "model": model,
            "mode": mode,
            "canaries": 1000,
            "claimed": runs[0].claim.epsilon,
            "lower_bounds": [r.bound.epsilon for r in runs],
            "smallest_p_of_claim": min(r.bound.p_value for r in runs),
            "power": runs[0].bound.power,
            "findings": sum(len(r.findings) for r in runs),
            "alarms": sum(len(r.alarms) for r in runs),
            "largest_distance": max(f.figure for r in runs for f in r.findings if f.instrument == "neighbours"),
            "seconds": max(r.seconds for r in runs),
        }
        print(model, mode, epsilon, [round(r.bound.epsilon, 2) for r in runs], flush=True)


def page(document: dict[str, Any]) -> str:
    """The same as Markdown tables."""
    machine = document["machine"]
    lines = [
        "# What the empirical audit catches",
        "",
        f"`python -m benchmarks.audit` on {machine['cpu']}, {machine['cores']} cores, {machine['date'][:10]}.",
        "A cell is the instrument's strongest alarm; – is none.",
        "",
        "| engine | planted fault | neighbours, draws, charges: figure | noise: figure, p "
        "| distinguisher: bound, claim |",
        "|---|---|---|---|---|",
    ]
    lines += [_fault_line(row) for row in document["faults"]]
    lines += [
        "",
        "Honest runs, 1,000 canaries, fresh coins and noise each time; bounds at 95 % confidence:",
        "",
        "| engine | canaries as | claimed | lower bounds | could have shown | largest distance / C | alarms |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_honest_line(row) for row in document["honest"]]
    power = ", ".join(f"{row['most_provable']:.1f} (m = {row['canaries']:,})" for row in document["power"])
    lines += ["", f"Most that any run can prove at 95 % and delta 1e-5, every guess right: {power}.", ""]
    return "\n".join(lines)


def _fault_line(row: dict[str, Any]) -> str:
    near, noise, drawn, charged, guesses = (row[i] for i in INSTRUMENTS)
    known = [
        *([f"**{float(near['figure']):.3g}** C: {_bare(near['name'])}"] if near else []),
        *([f"**{float(drawn['figure']):.3g}** {drawn['name'].split(',')[0]}, {_chance(drawn)}"] if drawn else []),
        *([f"**{float(charged['figure']):.3g}** {charged['name']}"] if charged else []),
    ]
    cells = [
        row["model"],
        row["fault"],
        "; ".join(known) or "–",
        f"**{float(noise['figure']):.3g}** {_bare(noise['name'])}, {_chance(noise)}" if noise else "–",
        f"**{row['lower_bound']:.2f}** over {row['claimed']:.2f}, {_chance(guesses)}"
        if guesses
        else f"{row['lower_bound']:.2f} of {row['claimed']:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _honest_line(row: dict[str, Any]) -> str:
    bounds = row["lower_bounds"]
    cells = [
        row["model"],
        "gradients" if row["mode"] == "gradient" else "records",
        f"{row['claimed']:.2f}",
        f"{min(bounds):.2f} to {max(bounds):.2f} in {len(bounds)} runs",
        f"{row['power']:.2f}",
        f"{row['largest_distance']:.6f}",
        f"{row['alarms']} of {row['findings']}",
    ]
    return "| " + " | ".join(cells) + " |"


def _chance(finding: dict[str, Any]) -> str:
    p = float(finding["p_value"])
    return f"p {p:.0e}" if p else "p below 1e-300"


def _bare(name: str) -> str:
    return name.split(" (C = ", maxsplit=1)[0]


if __name__ == "__main__":
    main()

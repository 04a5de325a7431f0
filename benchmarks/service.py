"""Measures what the service costs around the engine: `python -m benchmarks.service`, or `make bench`.

Each topic starts its own server in a process of its own and talks to it through the public client. Contenders of a
topic take turns in blocks, and figures are medians of the rounds' own differences and ratios.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.report import machine, results_path, write_json
from benchmarks.service_parts.clients import chart, concurrent_clients
from benchmarks.service_parts.epsilon import epsilon_cost
from benchmarks.service_parts.latency import control_calls, new_clients
from benchmarks.service_parts.loops import loop_ratio, service_cost
from benchmarks.service_parts.sampling import sampling
from benchmarks.service_parts.topic import Topic, core_share, show

TOPICS: dict[str, Callable[..., Topic]] = {
    "cost": service_cost,
    "latency": control_calls,
    "new": new_clients,
    "loop": loop_ratio,
    "clients": concurrent_clients,
    "sampling": sampling,
    "epsilon": epsilon_cost,
}


def chosen(names: str | None) -> list[str]:
    """The topics to measure.

    Raises:
        click.BadParameter: an unknown name, listing those that exist.
    """
    wanted = list(TOPICS) if names is None else names.split(",")
    unknown = [name for name in wanted if name not in TOPICS]
    if unknown:
        raise click.BadParameter(f"unknown {', '.join(unknown)}; known: {', '.join(TOPICS)}", param_hint="--only")
    return wanted


def keep(path: Path, name: str, topic: Topic, *, quick: bool, core_share: float) -> None:
    """Keep one topic; those measured before stay, each with the machine and the moment of its measurement."""
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"topics": {}}
    kept["topics"][name] = {"quick": quick, "core_share": core_share, **topic.kept()}
    kept["topics"] = {n: kept["topics"][n] for n in TOPICS if n in kept["topics"]}
    write_json(path, kept)


@click.command()
@click.option("--quick", is_flag=True, help="Few rounds.")
@click.option("--only", "names", help=f"Comma-separated, of: {', '.join(TOPICS)}.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads of torch.")
@click.option("--no-save", is_flag=True, help="Print only; write no JSON and no plot.")
def main(*, quick: bool, names: str | None, threads: int, no_save: bool) -> None:
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore", FutureWarning)  # of transformers and PEFT, about each other
    facts = machine()
    where = (
        f"{facts['cpu']}, {facts['cores']} cores, {threads} thread(s); torch {facts['torch']}; {facts['date'][:10]}"
    )
    print(where)
    path = results_path("service", facts)
    missed = []
    for name in chosen(names):
        before = core_share()
        with tempfile.TemporaryDirectory() as folder:
            topic = TOPICS[name](Path(folder), quick=quick)
        share = min(before, core_share())
        show(topic, core_share=share)
        missed += [str(requirement) for requirement in topic.requirements if not requirement.met]
        if not no_save:
            keep(path, name, topic, quick=quick, core_share=share)
            if name == "clients":
                path.with_suffix(".svg").write_text(chart(topic, where=where))
    print("\n".join(["not met:", *missed]) if missed else "every requirement was met")
    if not no_save:
        print(f"kept as {path}")


if __name__ == "__main__":
    main()

"""Many small clients at once: what they do together against the same clients one after the other."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.plot import Bar, Group, bar_chart
from benchmarks.report import Ratio, paired_ratio, round_orders
from benchmarks.service_parts.server import ServerProcess
from benchmarks.service_parts.topic import Requirement, Topic
from benchmarks.service_parts.workload import BUNDLED, batch_of, in_pairs, private_config
from tg_tinker import BatchData, TrainingClient

SMALL = replace(BUNDLED, records=2, tokens=64)
COUNTS, QUICK_COUNTS = (1, 2, 4, 8, 16), (1, 8)
MODES = ("tenant", "off")


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds of the clock for the same steps of the same clients, a value per round."""

    in_turn: list[float] = field(default_factory=list)
    together: list[float] = field(default_factory=list)

    @property
    def gain(self) -> Ratio:
        """Throughput of all at once over that of one after the other."""
        return paired_ratio(self.in_turn, self.together)


def take_steps(clients: Sequence[TrainingClient], batch: BatchData, *, steps: int, at_once: bool) -> float:
    """Seconds until every client has taken so many steps."""
    began_s = time.perf_counter()
    if at_once:
        with ThreadPoolExecutor(len(clients)) as pool:
            for done in [pool.submit(in_pairs, client, batch, steps) for client in clients]:
                done.result()
    else:
        for client in clients:
            in_pairs(client, batch, steps)
    return time.perf_counter() - began_s


def concurrent_clients(folder: Path, *, quick: bool) -> Topic:
    """1 to 16 clients, each with a private run and two records a step, with and without shared passes."""
    counts, steps, rounds = (QUICK_COUNTS, 3, 2) if quick else (COUNTS, 4, 5)
    batch = batch_of(SMALL)
    times = {mode: {count: Times() for count in counts} for mode in MODES}
    with ExitStack() as stack:
        clients: dict[str, list[TrainingClient]] = {}
        for mode in MODES:
            server = stack.enter_context(ServerProcess(folder / mode, settings={"share_passes": mode}))
            service = stack.enter_context(server.client())
            clients[mode] = [service.create_training_client(private_config(SMALL)) for _ in range(max(counts))]
            take_steps(clients[mode], batch, steps=2, at_once=True)
        for order in round_orders([f"{mode} {count}" for mode in MODES for count in counts], rounds=rounds):
            for name in order:
                mode, count = name.split()[0], int(name.split()[1])
                some, kept = clients[mode][:count], times[mode][count]
                kept.in_turn.append(take_steps(some, batch, steps=steps, at_once=False))
                kept.together.append(take_steps(some, batch, steps=steps, at_once=True))
    rows = [_row(mode, count, times[mode][count], steps) for mode in MODES for count in counts]
    return Topic(
        title=f"Clients at once: {SMALL.model}, each {SMALL.records} x {SMALL.tokens} tokens a step, private",
        columns=("", "in turn steps/s", "together steps/s", "gain", "quartiles"),
        rows=rows,
        requirements=[
            Requirement(
                what="8 clients together over the same 8 in turn, share_passes=tenant",
                measured=times["tenant"][8].gain.median,
                limit=2.0,
                unit="times",
                kind="at least",
            )
        ],
        notes=f"Steps per second of all clients. {steps} steps of each client, {rounds} rounds; gains are paired.",
        figures={"times": times, "gains": {m: {c: t.gain for c, t in by.items()} for m, by in times.items()}},
    )


def _row(mode: str, count: int, times: Times, steps: int) -> tuple[object, ...]:
    rates = [count * steps / sorted(values)[len(values) // 2] for values in (times.in_turn, times.together)]
    gain = times.gain
    name = f"{count} client{'s' if count > 1 else ''}, share_passes={mode}"
    return name, *(f"{rate:.1f}" for rate in rates), gain, f"{gain.low:.2f} to {gain.high:.2f}"


def chart(topic: Topic, *, where: str) -> str:
    """SVG of the gains."""
    gains: Mapping[str, Mapping[int, Ratio]] = topic.figures["gains"]
    groups = []
    for count in gains[MODES[0]]:
        bars = [
            Bar(
                label=f"share_passes={mode}",
                value=gains[mode][count].median,
                low=gains[mode][count].low,
                high=gains[mode][count].high,
                text=str(gains[mode][count]),
                kind="own" if mode == "tenant" else "bar",
            )
            for mode in MODES
        ]
        groups.append(Group(head=f"{count} client{'s' if count > 1 else ''}", bars=bars))
    return bar_chart(
        groups,
        title=topic.title,
        subtitle=where,
        axis="throughput together / one after the other, paired: median and quartiles; longer is faster",
        reference=1.0,
    )

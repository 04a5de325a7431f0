"""What the service adds to a training step: CPU time on a tiny model, wall time on the bundled one."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks.engine_peers.contender import Recipe
from benchmarks.engine_peers.ours import Ours
from benchmarks.engine_peers.shapes import Shape
from benchmarks.report import paired_ratio, round_orders
from benchmarks.service_parts.server import Cost, ServerProcess, measured
from benchmarks.service_parts.topic import Requirement, Topic
from benchmarks.service_parts.workload import BUNDLED, LOOPS, TINY, batch_of, private_config, tiny_models

BARE = "in process"
COLUMNS = ("", "server CPU ms", "own CPU ms", "wall ms", "server CPU above", "wall ratio", "quartiles")
NOTE = (
    "Per optimizer step, medians. 'in process' is the engine alone, in this process. Differences and ratios are\n"
    "to its block in the same round."
)


def interleave(
    shape: Shape, server: ServerProcess, loops: Sequence[str], *, steps: int, rounds: int
) -> dict[str, list[Cost]]:
    """Blocks of ``steps`` steps of each loop through the server and of the bare engine, in a new order each round."""
    bare, batch = Ours(shape, Recipe()), batch_of(shape)
    with server.client() as service:
        client = service.create_training_client(private_config(shape))
        blocks: dict[str, Callable[[int], object]] = {BARE: lambda n: [bare.step() for _ in range(n)]}
        for name in loops:
            blocks[name] = partial(LOOPS[name], client, batch)
        for block in blocks.values():
            block(max(2, steps // 10))
        costs: dict[str, list[Cost]] = {name: [] for name in blocks}
        for order in round_orders(list(blocks), rounds=rounds):
            for name in order:
                costs[name].append(measured(partial(blocks[name], steps), steps=steps, server=server))
    return costs


def extra_ms(costs: Mapping[str, Sequence[Cost]], name: str) -> float:
    """CPU milliseconds of the server per step above the bare loop's: median of the rounds' differences."""
    pairs = zip(costs[name], costs[BARE], strict=True)
    return 1e3 * statistics.median(c.server_cpu_s - b.own_cpu_s for c, b in pairs)


def table(costs: Mapping[str, Sequence[Cost]]) -> list[tuple[object, ...]]:
    """A row per loop."""
    rows: list[tuple[object, ...]] = []
    for name, taken in costs.items():
        medians = [statistics.median(getattr(c, field) for c in taken) for field in Cost.__dataclass_fields__]
        ratio = paired_ratio([c.wall_s for c in taken], [c.wall_s for c in costs[BARE]])
        above = "" if name == BARE else f"{extra_ms(costs, name):.1f}"
        spread = "" if name == BARE else f"{ratio.low:.3f} to {ratio.high:.3f}"
        rows.append((name, *(f"{1e3 * m:.1f}" for m in medians), above, f"{ratio.median:.3f}", spread))
    return rows


def service_cost(folder: Path, *, quick: bool) -> Topic:
    """CPU time of the server per step of a model so small that little else takes any."""
    steps, rounds = (10, 3) if quick else (50, 10)
    with ServerProcess(folder, models=tiny_models(folder / "model")) as server:
        costs = interleave(TINY, server, ("in pairs", "one by one"), steps=steps, rounds=rounds)
    extra = extra_ms(costs, "in pairs")
    return Topic(
        title=f"Service cost per step: 164,672 parameters, {TINY.records} x {TINY.tokens} tokens, private",
        columns=COLUMNS,
        rows=table(costs),
        requirements=[Requirement(what="server CPU above in process", measured=extra, limit=15.0, unit="ms")],
        notes=f"{NOTE} Blocks of {steps} steps, {rounds} rounds.",
        figures={"costs": costs, "extra_cpu_ms": extra},
    )


def loop_ratio(folder: Path, *, quick: bool) -> Topic:
    """The time of a step through the service over that of a step in process, on the bundled model."""
    steps, rounds = (2, 3) if quick else (2, 30)  # short blocks: whatever slows the machine slows whole rounds
    with ServerProcess(folder) as server:
        costs = interleave(BUNDLED, server, tuple(LOOPS), steps=steps, rounds=rounds)
    ratios = {name: paired_ratio([c.wall_s for c in costs[name]], [c.wall_s for c in costs[BARE]]) for name in LOOPS}
    pairs = ratios["in pairs"].median
    return Topic(
        title=f"The loop through gRPC: {BUNDLED.model}, {BUNDLED.records} x {BUNDLED.tokens} tokens, private",
        columns=COLUMNS,
        rows=table(costs),
        requirements=[Requirement(what="wall time, in pairs, over in process", measured=pairs, limit=1.03, unit="")],
        notes=f"{NOTE} Blocks of {steps} steps, {rounds} rounds.",
        figures={"costs": costs, "wall_ratios": ratios},
    )

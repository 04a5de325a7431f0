"""Measures the training step against its peers: `python -m benchmarks.engine`, or `make bench`.

All contenders of a shape are built once and take turns, in a new order each round, so what else the machine does
slows all of them alike; ratios are medians over rounds of each round's own ratio to plain PEFT. Before that, each
contender's first update is held against a loop over single records: nobody is fast by being wrong.
"""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import click
import torch

from benchmarks.engine_peers import BASE, CONTENDERS, build
from benchmarks.engine_peers.agreement import TOLERANCE, Reference, disagreement, reference
from benchmarks.engine_peers.contender import Recipe
from benchmarks.engine_peers.memory import step_bytes
from benchmarks.engine_peers.results import ShapeResult, memory_chart, over, show, summarize, time_chart
from benchmarks.engine_peers.shapes import QUICK, SHAPES, Shape, lengths, unavailable
from benchmarks.engine_peers.timing import interleave
from benchmarks.report import machine, results_path, write_json

ROUNDS, QUICK_ROUNDS = 15, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to measure.

    Attributes:
        contenders: in the order of their rows; the base is always among them.
        rounds: measured steps of each.
        threads: of torch.
        memory: measure it too, each contender in a process of its own.
    """

    contenders: tuple[str, ...] = tuple(CONTENDERS)
    rounds: int = ROUNDS
    threads: int = 1
    device: str = "cpu"
    memory: bool = True


def measure(shape: Shape, settings: Settings) -> ShapeResult:
    """Check, time and weigh all contenders on one shape."""
    checking = Recipe(optimizer="sgd", learning_rate=1.0, noise_multiplier=0.0, device=settings.device)
    expected = reference(shape, checking)
    bound = expected.median_norm
    recipe = Recipe(max_grad_norm=bound, device=settings.device)
    left_out, off_by = _check(shape, settings, expected, replace(checking, max_grad_norm=bound))
    present = [name for name in settings.contenders if name not in left_out]
    contenders = {name: build(name, shape, recipe) for name in present}
    samples = interleave(contenders, rounds=settings.rounds, device=settings.device)
    contenders.clear()
    gc.collect()
    memory = {name: step_bytes(name, shape, recipe, threads=settings.threads) for name in present if settings.memory}
    clock = "wall" if settings.device.startswith("cuda") else "cpu"
    tokens = int(lengths(shape).sum()) * shape.micro_batches
    peers = {
        name: over(samples, name, "ours", clock=clock)
        for name in present
        if CONTENDERS[name].private and name != "ours"
    }
    return ShapeResult(
        name=shape.name,
        description=shape.describe(),
        clock=clock,
        max_grad_norm=bound,
        rows=summarize(samples, off_by=off_by, step_bytes=memory, tokens=tokens),
        left_out=left_out,
        private_over_own=over(samples, "ours", "ours-plain", clock=clock),
        peers_over_ours={name: ratio for name, ratio in peers.items() if ratio is not None},
    )


def _check(
    shape: Shape, settings: Settings, expected: Reference, recipe: Recipe
) -> tuple[dict[str, str], dict[str, float | None]]:
    """Why contenders are left out, and how far the others' first update is from the reference."""
    left_out: dict[str, str] = {}
    off_by: dict[str, float | None] = {}
    for name in settings.contenders:
        entry = CONTENDERS[name]
        if entry.missing:
            left_out[name] = entry.missing
        elif name == BASE and shape.padded:
            off_by[name] = None  # its loss weighs records by their length: another objective, the same work
        else:
            try:
                bound = recipe.max_grad_norm if entry.private else None
                off = disagreement(build(name, shape, recipe), expected, max_grad_norm=bound)
            except Exception as e:
                if name == BASE:
                    raise
                left_out[name] = f"{entry.title} is left out: it fails here with {type(e).__name__}: {e}"
                continue
            off_by[name] = off
            if not off <= TOLERANCE:  # NaN is wrong too
                left_out[name] = f"{entry.title} is left out: its update differs by {off:.1e} from the loop's"
    return left_out, off_by


def chosen_shapes(names: str | None, *, quick: bool, changes: dict[str, Any]) -> list[Shape]:
    """The shapes to measure, with what the command line changes in them.

    Raises:
        click.BadParameter: an unknown name, listing those that exist.
    """
    shapes = list(QUICK if quick else SHAPES.values())
    if names is not None:
        unknown = [name for name in names.split(",") if name not in SHAPES]
        if unknown:
            raise click.BadParameter(
                f"unknown {', '.join(unknown)}; known: {', '.join(SHAPES)}", param_hint="--shapes"
            )
        shapes = [SHAPES[name] for name in names.split(",")]
    given = {field: value for field, value in changes.items() if value}
    suffix = "".join(f" {field}={value}" for field, value in given.items())
    return [replace(shape, name=shape.name + suffix, **given) for shape in shapes]


def run(shapes: Sequence[Shape], settings: Settings) -> list[ShapeResult]:
    """Measure and print shape by shape."""
    results = []
    for shape in shapes:
        reason = unavailable(shape)
        if reason is not None:
            print(f"{shape.name} is skipped: {reason}")
            continue
        results.append(measure(shape, settings))
        show(results[-1])
    return results


@click.command()
@click.option("--quick", is_flag=True, help="Shapes A to D only, few rounds.")
@click.option("--shapes", "names", help=f"Comma-separated, of: {', '.join(SHAPES)}.")
@click.option("--contenders", help=f"Comma-separated, of: {', '.join(CONTENDERS)}. The base always takes part.")
@click.option("--rounds", type=click.IntRange(1), help=f"Measured steps of each contender.  [{ROUNDS}]")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads of torch.")
@click.option("--device", default="cpu", show_default=True, help="cpu, or cuda for the GPU, which is then named.")
@click.option("--rank", type=click.IntRange(1), help="Of the adapter, in place of each shape's own.")
@click.option("--records", type=click.IntRange(1), help="Per micro-batch, in place of each shape's own.")
@click.option("--tokens", type=click.IntRange(4), help="Per record, in place of each shape's own.")
@click.option("--micro-batches", type=click.IntRange(1), help="Per optimizer step.")
@click.option("--padded", is_flag=True, help="Half of all tokens are padding.")
@click.option("--no-memory", is_flag=True, help="Leave step memory out.")
@click.option("--no-save", is_flag=True, help="Print only; write no JSON and no plot.")
def main(
    *,
    quick: bool,
    names: str | None,
    contenders: str | None,
    rounds: int | None,
    threads: int,
    device: str,
    no_memory: bool,
    no_save: bool,
    **changes: Any,
) -> None:
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore", FutureWarning)  # of transformers and FastDP, about each other
    wanted = set(contenders.split(",")) | {BASE} if contenders else set(CONTENDERS)
    if wanted - set(CONTENDERS):
        unknown = ", ".join(sorted(wanted - set(CONTENDERS)))
        raise click.BadParameter(f"unknown {unknown}; known: {', '.join(CONTENDERS)}", param_hint="--contenders")
    settings = Settings(
        contenders=tuple(name for name in CONTENDERS if name in wanted),
        rounds=rounds or (QUICK_ROUNDS if quick else ROUNDS),
        threads=threads,
        device=device,
        memory=not no_memory,
    )
    shapes = chosen_shapes(names, quick=quick, changes=changes)
    facts = machine()
    where = (
        facts["gpu"] if device.startswith("cuda") else f"{facts['cpu']}, {facts['cores']} cores, {threads} thread(s)"
    )
    where = f"{where}; torch {facts['torch']}; {facts['date'][:10]}"
    print(where)
    results = run(shapes, settings)
    if results and not no_save:
        path = results_path("engine", facts, device=device)
        write_json(path, {"machine": facts, "settings": settings, "shapes": results})
        path.with_suffix(".svg").write_text(time_chart(results, where=where))
        memory = memory_chart(results, where=where)
        if memory is not None:
            path.with_name(path.stem + "-memory.svg").write_text(memory)
        print(f"kept as {path} and .svg beside it")
    if any(name in result.left_out for result in results for name in ("ours", "ours-plain")):
        sys.exit("our own engine was left out of a shape; see above")


if __name__ == "__main__":
    main()

"""Measures the Tinker door beside the native one: `python -m benchmarks.gateway`.

The same private step of the same datums through gRPC and `tg_tinker`, and through HTTP and the unmodified SDK, on
one server in a process of its own. Blocks take turns; ratios are medians of the rounds' own.
"""

from __future__ import annotations

import os
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import click
import numpy as np
import torch

from benchmarks.engine_peers.shapes import Shape
from benchmarks.report import machine, paired_ratio, results_path, round_orders, write_json
from benchmarks.service_parts.server import Cost, ServerProcess, measured
from benchmarks.service_parts.topic import Requirement, Topic, core_share, show
from benchmarks.service_parts.workload import BUNDLED, batch_of
from tg_tinker import DPConfig
from tg_tinker.types.datum import Datum, ModelInput
from tg_tinker.types.optim import AdamParams

SMALL = replace(BUNDLED, records=2, tokens=64)
CLIENTS = 16
LEARNING_RATE = 1e-4
PRIVATE = DPConfig(noise_multiplier=1.0, target_epsilon=1e4, target_delta=1e-5)
SUFFIX = ":dp-eps10000-noise1.0-delta1e-5"
Block = Callable[[int], object]


class TinkerServerProcess(ServerProcess):
    """A server in a process of its own, with both doors open."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, settings={"tinker_port": 0})
        self.key = self._key

    def __enter__(self) -> Self:
        super().__enter__()
        assert self._process.stdout is not None
        found = re.match(r"the Tinker API is at (\S+);", self._process.stdout.readline())
        if found is None:
            raise RuntimeError("the server says nothing of the Tinker API")
        self.tinker_url = found[1]
        return self


def rows_of(shape: Shape) -> list[list[int]]:
    """The token ids of every record of the shape's batch."""
    batch = batch_of(shape)
    ids, mask = np.asarray(batch.input_ids), np.asarray(batch.attention_mask)
    return [row[real == 1].tolist() for row, real in zip(ids, mask, strict=True)]


def native_block(server: TinkerServerProcess, shape: Shape) -> Block:
    """Steps of a private run through gRPC: both calls, then both results."""
    client = server.client().create_lora_training_client(shape.model, rank=shape.rank, dp_config=PRIVATE)
    data = [
        Datum(ModelInput.from_ints(row[:-1]), {"target_tokens": row[1:], "weights": [1.0] * (len(row) - 1)})
        for row in rows_of(shape)
    ]
    adam = AdamParams(learning_rate=LEARNING_RATE)

    def block(steps: int) -> None:
        for _ in range(steps):
            loss, stepped = client.forward_backward(data, "cross_entropy"), client.optim_step(adam_params=adam)
            loss.result()
            stepped.result()

    return block


def tinker_block(server: TinkerServerProcess, shape: Shape) -> Block:
    """The same steps through HTTP and the SDK."""
    import tinker
    from tinker import types

    service = tinker.ServiceClient(base_url=server.tinker_url, api_key="tml-" + server.key)
    client = service.create_lora_training_client(shape.model + SUFFIX, rank=shape.rank).result()
    data = [
        types.Datum(
            model_input=types.ModelInput.from_ints(row[:-1]),
            loss_fn_inputs={
                "target_tokens": types.TensorData(data=row[1:], dtype="int64", shape=[len(row) - 1]),
                "weights": types.TensorData(data=[1.0] * (len(row) - 1), dtype="float32", shape=[len(row) - 1]),
            },
        )
        for row in rows_of(shape)
    ]
    adam = types.AdamParams(learning_rate=LEARNING_RATE)

    def block(steps: int) -> None:
        for _ in range(steps):
            loss, stepped = client.forward_backward(data, "cross_entropy"), client.optim_step(adam)
            loss.result()
            stepped.result()

    return block


def doors(server: TinkerServerProcess, *, quick: bool) -> Topic:
    """Time of a private step through each door."""
    steps, rounds = (5, 3) if quick else (20, 9)
    costs: dict[str, dict[str, list[Cost]]] = {}
    table: list[tuple[object, ...]] = []
    for shape in (BUNDLED, SMALL):
        name = f"{shape.records} x {shape.tokens} tokens"
        blocks = {"native": native_block(server, shape), "tinker": tinker_block(server, shape)}
        for block in blocks.values():
            block(3)
        taken: dict[str, list[Cost]] = {door: [] for door in blocks}
        for order in round_orders(list(blocks), rounds=rounds):
            for door in order:
                taken[door].append(measured(partial(blocks[door], steps), steps=steps, server=server))
        costs[name] = taken
        for door, values in taken.items():
            ratio = paired_ratio([c.wall_s for c in values], [c.wall_s for c in taken["native"]])
            medians = [
                1e3 * statistics.median(getattr(c, field) for c in values)
                for field in ("wall_s", "server_cpu_s", "own_cpu_s")
            ]
            table.append(
                (f"{name}, {door}", *(f"{m:.1f}" for m in medians), ratio, f"{ratio.low:.2f} to {ratio.high:.2f}")
            )
    return Topic(
        title=f"One private step through both doors: {BUNDLED.model}, rank {BUNDLED.rank}",
        columns=("", "wall ms", "server CPU ms", "client CPU ms", "wall ratio", "quartiles"),
        rows=table,
        notes=f"Per step, medians of {rounds} blocks of {steps} steps; ratios are to the round's native block.",
        figures={"costs": costs},
    )


def at_once(server: TinkerServerProcess, *, quick: bool) -> Topic:
    """Sixteen SDK clients, each with its own session and private run, at once and one after the other."""
    steps, rounds = (2, 2) if quick else (4, 5)
    blocks = [tinker_block(server, SMALL) for _ in range(CLIENTS)]
    _together(blocks, 2)
    in_turn: list[float] = []
    together: list[float] = []
    for _ in range(rounds):
        began_s = time.perf_counter()
        for block in blocks:
            block(steps)
        in_turn.append(time.perf_counter() - began_s)
        together.append(_together(blocks, steps))
    gain = paired_ratio(in_turn, together)
    rates = [CLIENTS * steps / statistics.median(values) for values in (in_turn, together)]
    return Topic(
        title=f"{CLIENTS} SDK clients at once: {SMALL.model}, each {SMALL.records} x {SMALL.tokens} tokens a step",
        columns=("", "in turn steps/s", "together steps/s", "gain", "quartiles"),
        rows=[(f"{CLIENTS} clients", *(f"{rate:.1f}" for rate in rates), gain, f"{gain.low:.2f} to {gain.high:.2f}")],
        requirements=[
            Requirement(
                what=f"{CLIENTS} clients together over the same in turn",
                measured=gain.median,
                limit=1.0,
                unit="times",
                kind="at least",
            )
        ],
        notes=f"Steps per second of all clients; {steps} steps of each, {rounds} rounds; gains are paired.",
        figures={"in_turn_s": in_turn, "together_s": together, "gain": gain},
    )


def _together(blocks: Sequence[Block], steps: int) -> float:
    began_s = time.perf_counter()
    with ThreadPoolExecutor(len(blocks)) as pool:
        for done in [pool.submit(block, steps) for block in blocks]:
            done.result()
    return time.perf_counter() - began_s


@click.command()
@click.option("--quick", is_flag=True, help="Few rounds.")
@click.option("--no-save", is_flag=True, help="Print only; write no JSON.")
def main(*, quick: bool, no_save: bool) -> None:
    torch.set_num_threads(1)
    os.environ["TINKER_TELEMETRY"] = "0"
    warnings.simplefilter("ignore", FutureWarning)
    facts = machine()
    kept: dict[str, Any] = {"topics": {}}
    for name, topic_of in {"doors": doors, "clients": at_once}.items():
        before = core_share()
        with tempfile.TemporaryDirectory() as folder, TinkerServerProcess(Path(folder)) as server:
            topic = topic_of(server, quick=quick)
        share = min(before, core_share())
        show(topic, core_share=share)
        kept["topics"][name] = {"quick": quick, "core_share": share, **topic.kept()}
    if not no_save:
        path = results_path("gateway", facts)
        write_json(path, kept)
        print(f"kept as {path}")


if __name__ == "__main__":
    main()

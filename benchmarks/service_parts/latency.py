"""How long the calls around training take: control calls while others train, a new client, a checkpoint."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from benchmarks.service_parts.server import ServerProcess
from benchmarks.service_parts.topic import Requirement, Topic, percentile
from benchmarks.service_parts.workload import BUNDLED, batch_of, in_pairs, private_config
from tg_tinker import BatchData, ServiceClient, TrainingClient

PERIOD_S = 0.01
TRAINED = replace(BUNDLED, records=64, tokens=32)
SMALL = replace(BUNDLED, records=8, tokens=32)


@contextmanager
def training(clients: Sequence[TrainingClient], batch: BatchData) -> Iterator[None]:
    """Every client trains, each in a thread of its own, until the block ends."""
    over = threading.Event()

    def train(client: TrainingClient) -> None:
        while not over.is_set():
            in_pairs(client, batch, 1)

    threads = [threading.Thread(target=train, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def probe(
    calls: Mapping[str, Callable[[], object]], *, count: int, period_s: float = PERIOD_S
) -> dict[str, list[float]]:
    """Seconds of ``count`` calls, taken in turn, one begun every ``period_s``; one that is late is begun at once."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    due_s = time.perf_counter()
    for name, call in itertools.islice(itertools.cycle(calls.items()), count):
        due_s = max(due_s + period_s, time.perf_counter())
        time.sleep(max(0.0, due_s - time.perf_counter()))
        began_s = time.perf_counter()
        call()
        taken[name].append(time.perf_counter() - began_s)
    return taken


def control_calls(folder: Path, *, quick: bool) -> Topic:
    """Calls that only ask, while private runs train in the same server."""
    count = 90 if quick else 900
    batch = batch_of(TRAINED)
    seconds: dict[str, dict[str, list[float]]] = {}
    with ServerProcess(folder) as server, server.client() as service, server.client() as other:
        trained = [service.create_training_client(private_config(TRAINED)) for _ in range(4)]
        for client in trained:
            in_pairs(client, batch, 1)
        asking = other.get_training_client(trained[0].id)
        calls: dict[str, Callable[[], object]] = {
            "get_info": asking.get_info,
            "list": lambda: other.list_training_clients(limit=10),
            "epsilon": lambda: asking.privacy.total_epsilon,
        }
        for busy in (0, 1, 4):
            with training(trained[:busy], batch):
                seconds[f"{busy} training"] = probe(calls, count=count)
    rows: list[tuple[object, ...]] = []
    requirements = []
    for situation, taken in seconds.items():
        everything = [s for values in taken.values() for s in values]
        for name, values in {**taken, "all": everything}.items():
            points = [percentile(values, p) for p in (50, 95, 99)]
            rows.append((f"{situation}: {name}", len(values), *(f"{1e3 * s:.1f}" for s in (*points, max(values)))))
        p95 = 1e3 * percentile(everything, 95)
        if not situation.startswith("0"):
            requirements.append(Requirement(what=f"p95 with {situation}", measured=p95, limit=20.0, unit="ms"))
    return Topic(
        title=f"Control calls while {TRAINED.model} trains, {TRAINED.records} x {TRAINED.tokens} tokens, private",
        columns=("", "calls", "p50 ms", "p95 ms", "p99 ms", "longest ms"),
        rows=rows,
        requirements=requirements,
        notes=f"One call every {1e3 * PERIOD_S:g} ms; one that is late begins as soon as the one before has ended.",
        figures={"seconds": seconds},
    )


def new_client(server: ServerProcess, service: ServiceClient) -> dict[str, float]:
    """Seconds that the first moments of a private run take, on a connection of its own and on one that exists."""
    config, batch = private_config(SMALL), batch_of(SMALL)
    seconds = {}
    began_s = time.perf_counter()
    with server.client() as own:
        fresh = own.create_training_client(config)
        seconds["connect and create"] = time.perf_counter() - began_s
        own.delete_training_client(fresh.id)
    began_s = time.perf_counter()
    client = service.create_training_client(config)
    seconds["create"] = time.perf_counter() - began_s
    in_pairs(client, batch, 1)
    began_s = time.perf_counter()
    client.save_state()
    seconds["save_state"] = time.perf_counter() - began_s
    service.delete_training_client(client.id)
    return seconds


def new_clients(folder: Path, *, quick: bool) -> Topic:
    """A new private client where the base model is in memory, and a checkpoint of its adapter."""
    rounds = 3 if quick else 15
    with ServerProcess(folder) as server, server.client() as service:
        keeper = service.create_training_client(private_config(SMALL))  # loads the base
        parameters = keeper.get_info().trainable_parameters
        taken = [new_client(server, service) for _ in range(rounds)]
    seconds = {name: [round_[name] for round_ in taken] for name in taken[0]}
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return Topic(
        title=f"A new client of {SMALL.model}, rank {SMALL.rank}, {parameters:,} trained parameters, private",
        columns=("", "median ms", "shortest ms", "longest ms"),
        rows=[
            (n, f"{1e3 * median[n]:.0f}", f"{1e3 * min(v):.0f}", f"{1e3 * max(v):.0f}") for n, v in seconds.items()
        ],
        requirements=[
            Requirement(what="connect and create", measured=median["connect and create"], limit=0.2, unit="s"),
            Requirement(what="save_state", measured=median["save_state"], limit=0.1, unit="s"),
        ],
        notes=f"{rounds} of each.",
        figures={"seconds": seconds},
    )

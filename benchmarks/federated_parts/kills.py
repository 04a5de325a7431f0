"""Sites and coordinators die at random moments: does any ledger show less than was released, does any run just stop?

In one process, 100 times: every message is handled by a new site, which may die before or after any call to its
server and any write to its folder; the coordinator dies likewise and is started again on its folder. Beside the
ledgers stands a second count: each draw of noise, taken in the Gaussian mechanism itself, by its noise multiplier,
which is another one for every site. A third of the runs masks updates, a third protects whole sites besides.

As processes, a few times: `tg-tinker serve`, `federated site` and `federated coordinator` get SIGKILL and are started
again, SuperNodes and the SuperLink with them.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.federated_parts.kept import Kept
from benchmarks.federated_parts.lab import POLL_S, Party, bigram_server, coordinator_config, policy_for
from tests.tg_tinker.federated.site_lab import Crash, Tripwire, Watched, WatchedFolder
from tg_tinker.errors import TGTinkerError
from tg_tinker.federated.coordinator import Coordinator, Progress
from tg_tinker.federated.flower.apps import client_app
from tg_tinker.federated.flower.in_process import InProcessGrid
from tg_tinker.federated.flower.link import FlowerLink
from tg_tinker.federated.link import Handler
from tg_tinker.federated.messages import Envelope
from tg_tinker.federated.policy import SitePolicy
from tg_tinker.federated.result import FederatedResult
from tg_tinker.federated.site import Site
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.dp.mechanism import GaussianMechanism

ROUNDS, LOCAL_STEPS, BATCH = 3, 2, 4
RECORDS = {"site-0": 40, "site-1": 70, "site-2": 130}
"""Public sizes differ, and with them the sites' noise multipliers: a draw of noise tells whose it is."""
MODES = ("plain", "masked", "sites")
MOST_STARTS = 60
RUNS, PROCESS_RUNS = 100, 3
COUNTED = {"in process": "draws of noise, counted beside the ledgers", "processes": "noised steps in stored updates"}
_REACH = 70  # points of a message's handling, roughly: a crash point beyond them does not happen


class Draws:
    """Every draw of noise in this process, by noise multiplier."""

    def __init__(self) -> None:
        self.count: Counter[float] = Counter()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Count inside the block."""
        plain = GaussianMechanism.add_noise_

        def add_noise_(mechanism: GaussianMechanism, arrays: Any) -> None:
            plain(mechanism, arrays)
            self.count[round(mechanism.noise_multiplier, 9)] += 1

        with patch.object(GaussianMechanism, "add_noise_", add_noise_):
            yield


@dataclass
class Luck:
    """When the next process dies."""

    rng: random.Random
    site_share: float = 0.25
    coordinator_share: float = 0.7
    site_kills: int = 0
    coordinator_kills: int = 0

    def wire(self, share: float) -> Tripwire:
        """For one life: at which point it ends, if it does."""
        return Tripwire(at=self.rng.randrange(_REACH) if self.rng.random() < share else -1)


@dataclass
class Mortal:
    """A site whose process may die in any message."""

    party: Party
    dataset: str
    policy: SitePolicy
    luck: Luck

    def handler(self) -> Handler:
        """Answers as a new process does; where it dies Flower sees an app that failed."""
        config = self.party.site_config(self.dataset, self.policy)

        def handle(request: Envelope) -> Envelope:
            wire = self.luck.wire(self.luck.site_share)
            service = self.party.service()
            try:
                site = Site(config, Watched(service, wire), self.party.key)  # type: ignore[arg-type]
                site._folder = WatchedFolder(config.state_dir, wire)
                return site.handle(request)
            except Crash:
                self.luck.site_kills += 1
                raise RuntimeError("killed") from None
            finally:
                service.close(wait_s=0)

        return handle


@dataclass
class Estate:
    """Servers that live through all runs: one of each site, one of the coordinator."""

    home: Path
    stack: ExitStack
    servers: dict[str, EmbeddedServer] = field(default_factory=dict)

    def party(self, name: str, run: str) -> Party:
        """A party of one run: a folder and a tenant of its own."""
        if name not in self.servers:
            self.servers[name] = self.stack.enter_context(bigram_server(self.home / name))
        made = Party(f"{name}-{run}", self.servers[name], self.home / run / name)
        made.name = name
        return made


def job_of(mode: str, name: str) -> dict[str, Any]:
    """A small job. Its promises are for the mechanics: so few sites could not keep a useful one."""
    job: dict[str, Any] = {
        "job_id": name,
        "base_model": "bigram",
        "rounds": ROUNDS,
        "local_steps": LOCAL_STEPS,
        "batch_size": BATCH,
        "optimizer": {"name": "sgd", "learning_rate": 0.5},
        "records": {"target_epsilon": 8.0, "target_delta": 1e-5},
        "min_sites": 2,
    }
    if mode == "masked":
        job["masking"] = {"clip": 1.0}
        job["min_sites"] = 3
    if mode == "sites":
        job["sites"] = {"population": 3, "noise_multiplier": 0.05, "target_epsilon": 1e5, "target_delta": 0.1}
    return job


def run_once(estate: Estate, number: int, mode: str, *, seed: int) -> dict[str, Any]:
    """One job under kills: what was drawn, what the ledgers say, how it ended."""
    name, luck = f"run-{number}", Luck(random.Random(seed))
    coordinator = estate.party("coordinator", name)
    sites = {site: estate.party(site, name) for site in RECORDS}
    policy = policy_for(coordinator, "bigram")
    handlers = {}
    for site, party in sites.items():
        with party.service() as service:
            texts = [f"patient {i}: fever" for i in range(RECORDS[site])]
            service.create_dataset("data", texts, target_epsilon=8.0, target_delta=1e-5)
        handlers[site] = Mortal(party, "data", policy, luck).handler()
    config = coordinator_config(coordinator, sites.values(), job_of(mode, name), max_attempts=8)
    draws, started = Draws(), time.monotonic()
    with draws.watched(), InProcessGrid({s: client_app(h) for s, h in handlers.items()}, workers=3) as grid:
        link = FlowerLink(grid, roster=config.job["roster"], key=coordinator.key, poll_s=POLL_S)
        ended, why, starts = _to_the_end(config, coordinator, link, luck)
    ledgers = {site: _ledger(party, "data", draws.count) for site, party in sites.items()}
    if ended is not None and ended.sites is not None:
        ledgers["federation"] = _ledger(coordinator, ended.sites.dataset_id, draws.count)
    used = [m for ledger in ledgers.values() for m in ledger.pop("multipliers")]
    if len(used) != len(set(used)):
        raise AssertionError(f"{name}: two ledgers have one noise multiplier, so draws cannot be told apart: {used}")
    return {
        "mode": mode,
        "seed": seed,
        "status": ended.status if ended is not None else "refused",
        "why": why,
        "rounds": len(ended.rounds) if ended is not None else 0,
        "site_kills": luck.site_kills,
        "coordinator_kills": luck.coordinator_kills,
        "starts": starts,
        "ledgers": ledgers,
        "seconds": time.monotonic() - started,
    }


def _to_the_end(config: Any, party: Party, link: FlowerLink, luck: Luck) -> tuple[FederatedResult | None, str, int]:
    """Start the coordinator again until it is done or says why it cannot be."""
    failures = 0
    for start in range(1, MOST_STARTS + 1):
        wire = luck.wire(luck.coordinator_share)
        service = party.service()

        def progress(event: Progress, wire: Tripwire = wire) -> None:
            wire.point(event.what)

        try:
            watched: Any = Watched(service, wire)
            result = Coordinator(config, watched, party.key, progress=progress).run(link)
        except Crash:
            luck.coordinator_kills += 1
            continue
        except TGTinkerError as e:
            failures += 1
            if failures > 3:
                return None, f"{type(e).__name__}: {e.message}", start
            continue
        finally:
            service.close(wait_s=0)
        failures += result.status == "failed"
        if result.status == "finished" or failures > 3:
            return result, result.why, start
    raise AssertionError(f"not done after {MOST_STARTS} starts")


def _ledger(party: Party, dataset_id: str, draws: Mapping[float, int]) -> dict[str, Any]:
    """What a ledger was charged for, beside what was drawn at its noise multipliers."""
    with party.service() as service:
        ledger = service.get_privacy_ledger(dataset_id)
    ledger.verify()
    multipliers = {round(float(charge.body["event"]["noise_multiplier"]), 9) for charge in ledger.charges}
    return {
        "multipliers": sorted(multipliers),
        "charges": len(ledger.charges),
        "draws": sum(draws[m] for m in multipliers),
        "epsilon": ledger.epsilon_spent,
        "target": ledger.target_epsilon,
    }


def undercounted(found: Mapping[str, Any]) -> list[str]:
    """Ledgers of a run that show fewer charges than noise was drawn, or more epsilon than their target."""
    return [
        name
        for name, ledger in found["ledgers"].items()
        if ledger["draws"] > ledger["charges"] or ledger["epsilon"] > ledger["target"]
    ]


def silent(found: Mapping[str, Any]) -> bool:
    """Whether a run neither finished nor said why."""
    return found["status"] != "finished" and not found["why"]


def run(cells: Path, *, runs: int = RUNS, process_runs: int = PROCESS_RUNS) -> dict[str, Any]:
    """Runs that do not stand in the file yet, in this process and as processes."""
    from benchmarks.federated_parts.process_kills import run_processes

    kept = Kept(cells)
    with tempfile.TemporaryDirectory() as home, ExitStack() as stack:
        estate = Estate(Path(home), stack)
        for number in range(runs):
            if kept.get("in process", str(number)) is None:
                found = run_once(estate, number, MODES[number % len(MODES)], seed=number)
                kept.put(found, "in process", str(number))
                kills = f"{found['site_kills']} + {found['coordinator_kills']} kills"
                print(number, found["mode"], found["status"], kills, undercounted(found), found["why"], flush=True)
    for number in range(process_runs):
        if kept.get("processes", str(number)) is None:
            found = run_processes(seed=number)
            kept.put(found, "processes", str(number))
            print("processes", number, found["status"], found["killed"], undercounted(found), flush=True)
    return {where: list(cells.values()) for where, cells in kept.cells.items()}


def page(figures: Mapping[str, Any]) -> list[str]:
    """The tables as Markdown."""
    lines: list[str] = []
    for where, runs in figures.items():
        ended = Counter(run["status"] for run in runs)
        ledgers = [ledger for run in runs for ledger in run["ledgers"].values()]
        if where == "in process":
            killed = {"sites": _sum(runs, "site_kills"), "the coordinator": _sum(runs, "coordinator_kills")}
        else:
            killed = dict(sorted(Counter(what for run in runs for what in run["killed"]).items()))
        lines += [
            f"{where.capitalize()}, {len(runs)} runs:",
            "",
            "| | |",
            "|---|---|",
            f"| kills of | {', '.join(f'{what}: {n}' for what, n in killed.items())} |",
            f"| ended | {', '.join(f'{n} {status}' for status, n in sorted(ended.items()))} |",
            f"| neither finished nor said why | {sum(map(silent, runs))} |",
            f"| ledgers | {len(ledgers)} |",
            f"| charges | {sum(ledger['charges'] for ledger in ledgers)} |",
            f"| {COUNTED[where]} | {sum(ledger['draws'] for ledger in ledgers)} |",
            f"| ledgers that show too little, or exceed their target | {sum(len(undercounted(r)) for r in runs)} |",
            "",
        ]
    return lines[:-1]


def _sum(runs: list[Any], name: str) -> int:
    return sum(int(run[name]) for run in runs)

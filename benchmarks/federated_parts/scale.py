"""How a federation grows: 10, 100, 1,000 simulated sites on one machine. Time of a round, memory, accounting.

Everything is in one process: the sites' apps, Flower's Grid in memory, the coordinator, and one server whose tenants
the sites are, each with its own ledger. Two jobs run: all sites in every round, each with privacy of its records; and
privacy of whole sites besides, with sites drawn for a round by chance, on a ledger of the coordinator's.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.federated_parts.kept import Kept
from benchmarks.federated_parts.lab import (
    Party,
    Timeline,
    bigram_server,
    coordinator_config,
    federate,
    policy_for,
    rss_mb,
)
from tg_tinker.errors import FederationRefusedError
from tg_tinker.federated.result import FederatedResult
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.dp.accounting import pld_epsilon
from tg_tinker_server.dp.events import event_from_json

SIZES = (10, 100, 1000)
ROUNDS, LOCAL_STEPS, BATCH, RECORDS = 2, 2, 5, 50
DRAWN = 100
"""Sites that are expected in a round under privacy of sites."""
WORKERS = 2
SITE_PRIVACY = {"noise_multiplier": 1.0, "target_epsilon": 10.0, "target_delta": 1e-5}


def run(cells: Path, sizes: Iterable[int] = SIZES) -> dict[str, Any]:
    """Every size that does not stand in the file."""
    kept = Kept(cells)
    for size in sizes:
        if kept.get(str(size)) is None:
            kept.put(measure(size), str(size))
        print(size, kept.get(str(size)), flush=True)
    return {"rounds": ROUNDS, "local_steps": LOCAL_STEPS, "sizes": kept.cells}


def measure(size: int) -> dict[str, Any]:
    """Both jobs over so many sites, on a new server."""
    with tempfile.TemporaryDirectory() as folder, bigram_server(Path(folder) / "server") as server:
        home = Path(folder)
        coordinator = Party("coordinator", server, home / "coordinator")
        sites = [Party(f"site-{i}", server, home / f"site-{i}") for i in range(size)]
        started = time.monotonic()
        for site in sites:
            with site.service() as service:
                texts = [f"patient {i}: fever and cough" for i in range(RECORDS)]
                service.create_dataset("data", texts, target_epsilon=20.0, target_delta=1e-5)
        return {
            "registering_s": time.monotonic() - started,
            "records": _job("records", coordinator, sites, server, home, {}),
            "sites": _job("sites", coordinator, sites, server, home, _site_privacy(size)),
        }


def _site_privacy(size: int) -> dict[str, Any]:
    return {"sites": {"population": size, "sample_rate": min(1.0, DRAWN / size), **SITE_PRIVACY}}


def _job(
    name: str, coordinator: Party, sites: list[Party], server: EmbeddedServer, home: Path, more: Mapping[str, Any]
) -> dict[str, Any]:
    own = Party("coordinator", server, home / f"coordinator-{name}", coordinator.key, coordinator.api_key)
    policy = policy_for(coordinator, "bigram")
    handlers = {site.name: site.handler("data", policy) for site in sites}
    job = {
        "job_id": name,
        "base_model": "bigram",
        "rounds": ROUNDS,
        "local_steps": LOCAL_STEPS,
        "batch_size": BATCH,
        "optimizer": {"name": "sgd", "learning_rate": 1.0},
        "records": {"target_epsilon": 8.0, "target_delta": 1e-5, "people": "disjoint"},
        "min_sites": 1,
        "round_timeout_s": 3600.0,
        **more,
    }
    config = coordinator_config(own, sites, job, join_timeout_s=3600.0)
    before, timeline = rss_mb(), Timeline()
    used = time.process_time()
    try:
        with highest_rss() as highest:
            result = federate(config, own, handlers, timeline=timeline, workers=WORKERS)
    except FederationRefusedError as e:
        return {"refused": e.reason, "message": e.message}
    if result.status != "finished":
        raise AssertionError(f"{name} with {len(sites)} sites failed: {result.why}")
    rounds = timeline.rounds()
    return {
        "round_s": rounds,
        "all_s": time.monotonic() - timeline.started,
        "cpu_s": time.process_time() - used,
        "memory_mb": highest[0] - before,
        "updates": [done.updates for done in result.rounds],
        **_accounts(result, own, sites),
    }


def _accounts(result: FederatedResult, coordinator: Party, sites: list[Party]) -> dict[str, Any]:
    """What the ledgers say, each checked, beside a second accountant."""
    started = time.monotonic()
    charges, epsilons, second = [], set(), set()
    for site in sites:
        with site.service() as service:
            ledger = service.get_privacy_ledger("data")
        ledger.verify()
        charges.append(len(ledger.charges))
        epsilons.add(ledger.epsilon_spent)
        if len(second) < 3 and ledger.charges:
            second.add(pld_epsilon([event_from_json(c.body["event"]) for c in ledger.charges], ledger.delta))
    found = {
        "ledgers": len(sites),
        "charges": sum(charges),
        "epsilon": max(epsilons),
        "epsilon_second": max(second, default=0.0),
        "statements": len(result.statements),
        "reading_s": time.monotonic() - started,
    }
    if result.sites is not None:
        with coordinator.service() as service:
            ledger = service.get_privacy_ledger(result.sites.dataset_id)
        ledger.verify()
        events = [event_from_json(charge.body["event"]) for charge in ledger.charges]
        found["federation"] = {
            "charges": len(ledger.charges),
            "epsilon": ledger.epsilon_spent,
            "epsilon_second": pld_epsilon(events, ledger.delta),
        }
    return found


@contextmanager
def highest_rss() -> Iterator[list[float]]:
    """The most memory of this process during the block, in MB, as the only element."""
    highest, stop = [rss_mb()], threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            highest[0] = max(highest[0], rss_mb())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield highest
    finally:
        stop.set()
        thread.join()
        highest[0] = max(highest[0], rss_mb())


def page(figures: Mapping[str, Any]) -> list[str]:
    """The tables as Markdown."""
    lines = [
        "Bigram model (67,600 numbers), everything in one process: all sites' apps, one server whose tenants they "
        f"are, the Grid, the coordinator. {figures['rounds']} rounds of {figures['local_steps']} steps at each site.",
        "",
        "| sites | privacy of | updates a round | round, s | for each update, ms | memory, MB | ledgers | charges "
        "| epsilon of a site | second accountant |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for size, found in figures["sizes"].items():
        for kind in ("records", "sites"):
            lines.append(_row(int(size), kind, found[kind]))
    return [*lines, *_notes(figures)]


def _row(size: int, kind: str, job: Mapping[str, Any]) -> str:
    what = "records" if kind == "records" else "records and sites"
    if "refused" in job:
        return f"| {size:,} | {what} | refused: {job['refused']} | | | | | | | |"
    updates = [u for u in job["updates"] if u is not None] or [job.get("drawn", 0)]
    mean_s = sum(job["round_s"]) / len(job["round_s"])
    shown = f"{sum(updates) / len(updates):.0f}" if any(updates) else "not told"
    each = f"{1000 * mean_s / (sum(updates) / len(updates)):.0f}" if any(updates) else ""
    return (
        f"| {size:,} | {what} | {shown} | {mean_s:.1f} | {each} | {job['memory_mb']:.0f} | {job['ledgers']:,} "
        f"| {job['charges']:,} | {job['epsilon']:.3f} | {job['epsilon_second']:.3f} |"
    )


def _notes(figures: Mapping[str, Any]) -> list[str]:
    lines = [""]
    for size, found in figures["sizes"].items():
        job = found["sites"]
        if "refused" in job:
            lines += [
                f"Privacy of sites with {int(size):,} sites is refused before anybody is asked: {job['message']}"
            ]
        else:
            spent = job["federation"]
            lines += [
                f"Privacy of sites with {int(size):,} sites: the federation's ledger has {spent['charges']} charges, "
                f"epsilon {spent['epsilon']:.3f}; by the second accountant {spent['epsilon_second']:.3f}."
            ]
    return lines

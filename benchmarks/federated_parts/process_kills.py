"""A federation of real processes under SIGKILL: servers, sites and SuperNodes, the coordinator and its SuperLink.

Whoever is killed is started again on its folder, as a service manager would. The second count of steps is that of the
updates which each site has stored: none can be made without its noised steps.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tg_tinker.federated.coordinator_config import CoordinatorConfig
from tg_tinker.federated.flower.program import free_port
from tg_tinker.federated.result import FederatedResult
from tg_tinker.federated.site_state import StateFolder
from tg_tinker_server.federated_demo.arms import register
from tg_tinker_server.federated_demo.parties import COORDINATOR, Party, parties, write_coordinator, write_site
from tg_tinker_server.federated_demo.processes import certificates, node_keys
from tg_tinker_server.federated_demo.settings import DATASET, FederatedDemoSettings
from tg_tinker_server.federated_demo.supervision import Child, stop_all

SITES = ("north", "south", "west")
SETTINGS = FederatedDemoSettings(
    model_ref="bigram", rounds=4, local_steps=2, expected_batch_size=16, learning_rate=0.5, held_out=1
)
JOB = "kills"
KILLS = 8
LONGEST_S = 600.0
_UP = r"tg-tinker serves on (\S+) "
_DONE = "result.json"
_PAUSE_S = (1.0, 4.0)  # between two kills


@dataclass
class Service:
    """A command that is started again whenever it ends, as a service manager does."""

    name: str
    start: Callable[[], Child]
    child: Child | None = None
    starts: int = 0

    def keep(self) -> None:
        """Start it if it does not run."""
        if self.child is None or self.child.ended_within(0):
            self.child = self.start()
            self.starts += 1


@dataclass
class Manager:
    """Everything that runs on the machines of all parties, and who kills it."""

    folder: Path
    rng: random.Random
    services: dict[str, Service] = field(default_factory=dict)
    killed: list[str] = field(default_factory=list)

    def add(self, name: str, arguments: list[str], log: Path, environ: dict[str, str]) -> Service:
        """A command to keep running."""
        made = Service(name, lambda: Child(name, arguments, log, environ))
        self.services[name] = made
        return made

    def kill_one(self) -> None:
        """SIGKILL to a command or to what Flower runs beneath it."""
        victims: list[tuple[str, int]] = []
        for name, service in self.services.items():
            if service.child is not None and not service.child.ended_within(0):  # a free number may be anybody's
                kind = name.split(":")[0]
                victims.append((kind, service.child.pid))
                beneath = {"site": "supernode", "coordinator": "superlink"}.get(kind)
                if beneath:
                    victims += [(beneath, pid) for pid in children_of(service.child.pid)]
        kind, pid = self.rng.choice(victims)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.killed.append(kind)

    def stop(self) -> None:
        """End everything."""
        stop_all([s.child for s in self.services.values() if s.child is not None], patience_s=5)


def children_of(pid: int) -> list[int]:
    """Processes whose parent this is."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(entry.name))
    return found


def run_processes(*, seed: int, kills: int = KILLS) -> dict[str, Any]:
    """One job under so many SIGKILLs, to its end: how it ended, and what every ledger says."""
    with tempfile.TemporaryDirectory() as home:
        folder, manager = Path(home), Manager(Path(home), random.Random(seed))
        started = time.monotonic()
        try:
            found = _started(manager, folder)
            why = _killed_until_done(manager, folder, kills, started)
            ledgers = {name: _ledger(found[name], manager) for name in SITES}
        finally:
            manager.stop()
        done = folder / _DONE
        result = FederatedResult.model_validate_json(done.read_text()) if done.exists() else None
        return {
            "seed": seed,
            "status": result.status if result is not None else "unfinished",
            "why": why if result is None else result.why,
            "rounds": len(result.rounds) if result is not None else 0,
            "kills": len(manager.killed),
            "killed": manager.killed,
            "starts": {name: service.starts for name, service in manager.services.items()},
            "ledgers": ledgers,
            "seconds": time.monotonic() - started,
        }


def _started(manager: Manager, folder: Path) -> dict[str, Party]:
    found = parties(folder, SITES)
    environ = {"TG_TINKER_SERVER_BACKEND": "bigram", "OMP_NUM_THREADS": "1"}
    for name, party in found.items():
        address = f"127.0.0.1:{free_port()}"
        found[name] = replace(party, address=address)
        arguments = ["serve", "--data-dir", str(party.data_dir), "--port", address.rpartition(":")[2]]
        manager.add(f"server:{name}", arguments, party.folder / "server.log", environ).keep()
    for i, name in enumerate(SITES):
        child = manager.services[f"server:{name}"].child
        assert child is not None
        child.wait_for(_UP, 120)
        with found[name].client() as service:
            register(service, DATASET, [f"patient {n}: fever" for n in range(50 + 10 * i)], SETTINGS)
    coordinator, sites = found[COORDINATOR], {name: found[name] for name in SITES}
    address = f"127.0.0.1:{free_port()}"
    flower = {"address": address, **certificates(coordinator), "node_keys": node_keys(sites)}
    expires = (datetime.now(UTC) + timedelta(days=1)).isoformat(timespec="seconds")
    job = {**SETTINGS.job(job_id=JOB, expires=expires), "round_timeout_s": 20.0}
    job["roster"] = {name: party.public_key() for name, party in sites.items()}
    write_coordinator(coordinator, job, flower=flower)
    text = coordinator.config.read_text(encoding="utf-8")
    coordinator.config.write_text("max_attempts = 100\n" + text, encoding="utf-8")
    for name, party in sites.items():
        flower = {
            "superlink": address,
            "root_certificates": (coordinator.folder / "ca.crt").absolute(),
            "node_key": "node.key",
        }
        write_site(party, SETTINGS, coordinator=coordinator.public_key(), flower=flower)
        arguments = ["federated", "site", "--config", str(party.config)]
        manager.add(f"site:{name}", arguments, party.folder / "site.log", {}).keep()
    arguments = ["federated", "coordinator", "--config", str(coordinator.config), "--result", str(folder / _DONE)]
    manager.add("coordinator", arguments, coordinator.folder / "coordinator.log", {}).keep()
    return found


def _killed_until_done(manager: Manager, folder: Path, kills: int, started: float) -> str:
    """Kill, start again, until the job is finished; why it is not, otherwise."""
    coordinator = manager.services["coordinator"]
    assert coordinator.child is not None
    coordinator.child.wait_for("joined", 180)
    next_kill = time.monotonic()
    while time.monotonic() - started < LONGEST_S:
        if _finished(folder):
            return ""
        for service in manager.services.values():
            service.keep()
        if len(manager.killed) < kills and time.monotonic() >= next_kill:
            manager.kill_one()
            next_kill = time.monotonic() + manager.rng.uniform(*_PAUSE_S)
        time.sleep(0.1)
    words = coordinator.child.said().strip().splitlines()
    return f"not finished after {LONGEST_S:g} s; the coordinator's last words: {words[-1] if words else '(none)'}"


def _finished(folder: Path) -> bool:
    """Whether there is a result that will not get better by another attempt."""
    path = folder / _DONE
    try:
        return FederatedResult.model_validate_json(path.read_text()).status == "finished"
    except (OSError, ValueError):
        return False  # none yet, or half of one


def _ledger(party: Party, manager: Manager) -> dict[str, Any]:
    """What a site's ledger was charged for, beside the steps of the updates that it stored."""
    service = manager.services[f"server:{party.name}"]
    service.keep()
    assert service.child is not None
    service.child.wait_for(_UP, 120)
    config = CoordinatorConfig.load(party.folder.parent / COORDINATOR / "coordinator.toml")
    with StateFolder(party.folder / "state").open(wait_s=60) as state:
        digest = state.digest_of(JOB)
        rounds = len(state.rounds_trained(digest)) if digest is not None else 0
    with party.client() as client:
        ledger = client.get_privacy_ledger(DATASET)
    ledger.verify()
    return {
        "charges": len(ledger.charges),
        "draws": rounds * int(config.job["local_steps"]),
        "epsilon": ledger.epsilon_spent,
        "target": ledger.target_epsilon,
    }

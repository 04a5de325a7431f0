"""Federations to measure: real servers in this process, Flower's Grid in memory, the apps unchanged.

Sites of the bigram model are tenants of one server, each with its own key, ledger and state folder: 1,000 servers
would measure this machine's memory and nothing else. Every message is handled by a new ``Site`` with a new
connection, as by a process that was started for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tg_tinker import ServiceClient, TrainingConfig
from tg_tinker.federated.coordinator import Coordinator, Progress, Released
from tg_tinker.federated.coordinator_config import CoordinatorConfig
from tg_tinker.federated.flower.apps import client_app
from tg_tinker.federated.flower.in_process import InProcessGrid
from tg_tinker.federated.flower.link import FlowerLink
from tg_tinker.federated.keys import public_text
from tg_tinker.federated.link import Handler
from tg_tinker.federated.messages import Envelope
from tg_tinker.federated.policy import SitePolicy
from tg_tinker.federated.result import FederatedResult
from tg_tinker.federated.site import Site
from tg_tinker.federated.site_config import SiteConfig
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.demo.measure import perplexity

T = TypeVar("T")
R = TypeVar("R")
ROLES = ("trainer", "exporter", "auditor")
EXPIRES = datetime.now(UTC) + timedelta(days=30)
POLL_S = 0.02


@dataclass
class Party:
    """A site or the coordinator: a tenant of a server, with a folder."""

    name: str
    server: EmbeddedServer
    folder: Path
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    api_key: str = ""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.api_key = self.api_key or self.server.mint_key(self.name, ROLES)

    def service(self) -> ServiceClient:
        """A new connection to its server."""
        return ServiceClient(api_key=self.api_key, base_url=self.server.address)

    def site_config(self, dataset: str, policy: SitePolicy) -> SiteConfig:
        """The configuration of this site."""
        return SiteConfig(
            site=self.name,
            server=self.server.address,
            dataset=dataset,
            identity=self.folder / "unused.key",
            state_dir=self.folder / "state",
            api_key_env="UNUSED",
            policy=policy,
        )

    def handler(self, dataset: str, policy: SitePolicy) -> Handler:
        """Answers each message as a process would that was started for it."""
        config = self.site_config(dataset, policy)

        def handle(request: Envelope) -> Envelope:
            service = self.service()
            try:
                return Site(config, service, self.key).handle(request)
            finally:
                service.close(wait_s=0)

        return handle


@contextmanager
def bigram_server(folder: Path) -> Iterator[EmbeddedServer]:
    """A server with the bigram model, large enough for many tenants."""
    config = ServerConfig(port=0, backend="bigram", data_dir=folder, log_level="error", share_passes="off")
    with EmbeddedServer(config) as server:
        yield server


def policy_for(coordinator: Party, model: str, **rules: Any) -> SitePolicy:
    """Agrees to what these benchmarks ask for."""
    limits = {
        "max_rounds": 1000,
        "max_local_steps": 1000,
        "max_epsilon": 1e6,
        "max_delta": 0.5,
        "max_record_tokens": 2,
    }
    return SitePolicy(
        coordinator=public_text(coordinator.key),
        base_models=(model,),
        min_noise_multiplier=0.0,
        **{**limits, **rules},
    )


def coordinator_config(coordinator: Party, sites: Iterable[Party], job: Mapping[str, Any], **more: Any) -> Any:
    """The configuration of the coordinator of a job over these sites."""
    whole = {
        "roster": {site.name: public_text(site.key) for site in sites},
        "expires": EXPIRES,
        **job,
    }
    return CoordinatorConfig(
        server=coordinator.server.address,
        api_key_env="UNUSED",
        identity=coordinator.folder / "unused.key",
        state_dir=coordinator.folder / "state",
        job=whole,
        **{"pause_s": 0.01, "join_timeout_s": 30.0, **more},
    )


@dataclass
class Timeline:
    """Seconds at which things happened, since it was made."""

    started: float = field(default_factory=time.monotonic)
    asked: dict[int, float] = field(default_factory=dict)
    released: dict[int, float] = field(default_factory=dict)
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)

    def note(self, event: Progress) -> None:
        """A coordinator's progress."""
        now = time.monotonic() - self.started
        if event.what == "asked":
            self.asked.setdefault(event.round, now)
        elif event.what == "released":
            self.released[event.round] = now
            self.metrics[event.round] = dict(event.metrics or {})

    def rounds(self) -> list[float]:
        """Seconds of each released round."""
        return [self.released[r] - self.asked[r] for r in sorted(self.released)]


def federate(
    config: Any,
    coordinator: Party,
    handlers: Mapping[str, Handler],
    *,
    timeline: Timeline,
    evaluate: Callable[[Released], Mapping[str, float]] | None = None,
    workers: int = 2,
) -> FederatedResult:
    """One job from its beginning to its end."""
    apps = {name: client_app(handler) for name, handler in handlers.items()}
    roster = config.job["roster"]
    with InProcessGrid(apps, workers=workers) as grid, coordinator.service() as service:
        link = FlowerLink(grid, roster=roster, key=coordinator.key, poll_s=POLL_S, hello_timeout_s=600)
        run = Coordinator(config, service, coordinator.key, progress=timeline.note, evaluate=evaluate)
        return run.run(link)


LARGEST_PERPLEXITY = 1e300
"""Stands for any above it."""


class Reader:
    """Perplexity of released adapters on public texts, asked of a server that trains nothing on them."""

    def __init__(self, party: Party, config: TrainingConfig, held_out: Sequence[str]) -> None:
        self._service = party.service()
        self._tc = self._service.create_training_client(config)
        self._held_out = held_out
        self._lock = threading.Lock()

    def __call__(self, released: Released) -> dict[str, float]:
        """As ``Coordinator(evaluate=...)`` wants it."""
        with self._lock:
            self._tc.load_state(released.artifact_id, optimizer=False)
            try:
                return {"perplexity": perplexity(self._tc, self._held_out, batch_size=128)}
            except OverflowError:  # more than float64 can say
                return {"perplexity": LARGEST_PERPLEXITY}

    def close(self) -> None:
        """Free the model."""
        self._service.delete_training_client(self._tc.id)
        self._service.close(wait_s=0)


def dealt(texts: Sequence[str], sites: int) -> list[list[str]]:
    """Texts dealt out evenly, in order."""
    return [list(texts[i::sites]) for i in range(sites)]


def rss_mb() -> float:
    """Memory of this process now, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return float("nan")


def in_order(stack: ExitStack, things: Iterable[Any]) -> list[Any]:
    """Enter each and keep it until the stack closes."""
    return [stack.enter_context(thing) for thing in things]


def update_norm(arrays: Mapping[str, np.ndarray[Any, Any]]) -> float:
    """L2 norm over all arrays."""
    return float(np.sqrt(sum(float(np.sum(np.square(a, dtype=np.float64))) for a in arrays.values())))

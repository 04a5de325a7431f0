"""A site for tests: a real server in process, a coordinator's key, a site that may die at any numbered point."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from tests.tg_tinker.federated.jobs import key_of
from tg_tinker import ServiceClient
from tg_tinker.federated.job import Job
from tg_tinker.federated.keys import public_text
from tg_tinker.federated.messages import Envelope
from tg_tinker.federated.policy import SitePolicy
from tg_tinker.federated.site import Site
from tg_tinker.federated.site_budget import epsilon_of
from tg_tinker.federated.site_config import SiteConfig
from tg_tinker.federated.site_memory import history_of
from tg_tinker.federated.site_state import SiteState, StateFolder
from tg_tinker.federated.statement import SiteStatement, verify_statement
from tg_tinker.federated.updates import weights_digest
from tg_tinker.futures import FutureHandle
from tg_tinker.training_client import TrainingClient
from tg_tinker_server.app import EmbeddedServer

COORDINATOR = key_of("coordinator")
TEXTS = [f"patient {i}: fever, cough, day {i * i}" for i in range(23)]
ADAPTER = {"table": np.zeros((260, 260), np.float32)}
"""What the bigram starts from."""


class Crash(BaseException):
    """The process is gone: nothing may catch it, and nothing is tidied up."""


@dataclass
class Tripwire:
    """Counts points that are passed; at ``at`` the process dies."""

    at: int = -1
    passed: list[str] = field(default_factory=list)

    def point(self, name: str) -> None:
        self.passed.append(name)
        if len(self.passed) - 1 == self.at:
            raise Crash(name)


class Watched:
    """A service, run or future whose every call is a point before and a point after."""

    def __init__(self, target: Any, wire: Tripwire) -> None:
        self._target, self._wire = target, wire

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if not callable(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            self._wire.point(f"before {name}")
            result = value(*args, **kwargs)
            self._wire.point(f"after {name}")
            return Watched(result, self._wire) if isinstance(result, TrainingClient | FutureHandle) else result

        return call


class WatchedFolder(StateFolder):
    """A state folder whose every write is a point before and a point after."""

    def __init__(self, folder: Path, wire: Tripwire) -> None:
        super().__init__(folder)
        self._wire = wire

    @contextlib.contextmanager
    def open(self, *, wait_s: float):
        with super().open(wait_s=wait_s) as state:
            plain_transaction, plain_masking, wire = state._transaction, state.set_masking, self._wire

            @contextlib.contextmanager
            def transaction():
                with plain_transaction():
                    yield
                    wire.point("before commit")
                wire.point("after commit")

            def set_masking(*args: Any) -> None:
                wire.point("before masking")
                plain_masking(*args)
                wire.point("after masking")

            state._transaction, state.set_masking = transaction, set_masking
            yield state


@dataclass
class Party:
    """One site and its coordinator. Every message is handled by a new process with a new connection."""

    server: EmbeddedServer
    folder: Path
    name: str = "site-0"
    dataset: str = "data"
    policy: dict[str, Any] = field(default_factory=dict)
    clock: datetime = datetime(2026, 6, 1, tzinfo=UTC)
    api_key: str = ""

    def __post_init__(self) -> None:
        self.api_key = self.api_key or self.server.mint_key()
        self.key = key_of(self.name)

    def service(self) -> ServiceClient:
        return ServiceClient(api_key=self.api_key, base_url=self.server.address)

    def register(self, texts: list[str] | None = None, **terms: Any) -> None:
        with self.service() as service:
            service.create_dataset(self.dataset, texts or TEXTS, **{"target_delta": 1e-5, **terms})

    def config(self) -> SiteConfig:
        rules = {
            "coordinator": public_text(COORDINATOR),
            "base_models": ("bigram",),
            "max_record_tokens": 64,
            **self.policy,
        }
        return SiteConfig(
            site=self.name,
            server=self.server.address,
            dataset=self.dataset,
            identity=self.folder / "identity.key",
            state_dir=self.folder / "state",
            api_key_env="UNUSED",
            policy=SitePolicy(**rules),
        )

    def handle(self, request: Envelope, *, wire: Tripwire | None = None) -> Envelope:
        """A new process answers one message; its signature is checked."""
        service = self.service()
        site = Site(
            self.config(), service if wire is None else Watched(service, wire), self.key, now=lambda: self.clock
        )
        if wire is not None:
            site._folder = WatchedFolder(self.folder / "state", wire)
        try:
            reply = site.handle(request)
        finally:
            service.close(wait_s=0)
        reply.verify(self.key.public_key())
        return reply

    def ask(self, job: Job, kind: str, round_: int = 0, *, wire: Tripwire | None = None, **parts: Any) -> Envelope:
        """Ask what a coordinator asks."""
        return self.handle(self.request(job, kind, round_, **parts), wire=wire)

    def request(
        self, job: Job, kind: str, round_: int = 0, *, key: Any = COORDINATOR, attempt: int = 1, **parts: Any
    ) -> Envelope:
        """A signed request."""
        fields = {"job": job.digest(), "site": self.name, "round": round_, "attempt": attempt, **parts}
        return Envelope(kind=kind, direction="request", **fields).signed(key)

    def join(self, job: Job) -> Envelope:
        """Ask to join, and be accepted."""
        reply = self.ask(job, "join", facts={"job": job.model_dump(mode="json")})
        assert reply.facts == {"accepted": True}, reply.facts
        return reply

    def charges(self) -> int:
        """What the ledger of the site's data was charged for."""
        with self.service() as service:
            return len(service.get_privacy_ledger(self.dataset).charges)

    def statement(self, job: Job) -> SiteStatement:
        """The site's statement, its signature checked."""
        return verify_statement(self.ask(job, "finish").facts["statement"], public_text(self.key))

    def epsilon_of_all(self, delta: float = 1e-5) -> float:
        """Of every charge in the ledger, at its true rate."""
        with self.service() as service:
            return epsilon_of(history_of(service, self.dataset).releases, delta)

    def releases(self) -> int:
        """Noised steps that ended with a release."""
        with self.service() as service:
            entries = service.get_privacy_ledger(self.dataset).entries
        return sum(e.kind == "settle" and e.body["outcome"] == "released" for e in entries)

    def audit(self, operation: str) -> list[dict[str, str]]:
        """Facts of what the server's audit log has of an operation."""
        with self.service() as service:
            return [entry.facts for entry in service.get_audit_logs(operation=operation)]

    def operations(self) -> set[str]:
        """Every operation in the audit log."""
        with self.service() as service:
            return {entry.operation for entry in service.get_audit_logs(limit=1000)}

    @contextlib.contextmanager
    def state(self):
        """The site's state, as it is on disk."""
        with StateFolder(self.folder / "state").open(wait_s=1) as state:
            assert isinstance(state, SiteState)
            yield state


def site_job(**settings: Any) -> Job:
    """A job for `Party`: two rounds of two steps, each over four of its records."""
    fields: dict[str, Any] = {
        "job_id": "icd",
        "base_model": "bigram",
        "rounds": 2,
        "local_steps": 2,
        "batch_size": 4,
        "roster": {"site-0": public_text(key_of("site-0")), "site-1": public_text(key_of("site-1"))},
        "coordinator": public_text(COORDINATOR),
        "expires": datetime(2026, 7, 1, tzinfo=UTC),
        "adapter_digest": weights_digest(ADAPTER),
        "optimizer": {"name": "sgd", "learning_rate": 0.5},
    }
    return Job.model_validate({**fields, **settings})


def moved(weights: dict[str, np.ndarray], update: Any) -> dict[str, np.ndarray]:
    """Weights after an update."""
    return {name: (weights[name] + update[name]).astype(np.float32) for name in weights}

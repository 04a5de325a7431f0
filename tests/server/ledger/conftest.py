"""A ledger on a database of its own, and the short way to spend from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tg_tinker.ledger.history import read_history
from tg_tinker_server.crypto.envelope import TenantKeyring
from tg_tinker_server.crypto.keys import LocalKeyProvider
from tg_tinker_server.crypto.signing import TenantSigner
from tg_tinker_server.dp.events import Event, SampledGaussian
from tg_tinker_server.ledger.fold import Terms
from tg_tinker_server.ledger.log import TransparencyLog
from tg_tinker_server.ledger.privacy_ledger import PrivacyLedger
from tg_tinker_server.ledger.report import ReportWriter
from tg_tinker_server.ledger.reservation import DatasetScope, Reservation
from tg_tinker_server.service.tenant_keys import StoredKeyRows
from tg_tinker_server.store.database import Database

SCOPE = DatasetScope(tenant="t", dataset_id="data-1")
EVENT = SampledGaussian(noise_multiplier=1.0, sample_rate=0.1, vouched_by="client")
DELTA = 1e-5


@dataclass
class Book:
    """One ledger over one database, with the dataset's terms filled in."""

    db: Database
    event: Event = EVENT
    target: float | None = 8.0
    accountant: str = "rdp"
    scope: DatasetScope = SCOPE
    delta: float = DELTA

    def __post_init__(self) -> None:
        self.ledger = PrivacyLedger(self.db, clock=lambda: datetime(2026, 1, 2, tzinfo=UTC))

    def register(self, slots: int = 1000) -> Book:
        terms = Terms(unit="datum", target_epsilon=self.target, target_delta=self.delta)
        self.db.write(lambda tx: self.ledger.register(tx, self.scope, terms=terms, slots=slots, actor="key_1"))
        return self

    def writer(self) -> ReportWriter:
        keyring = TenantKeyring(LocalKeyProvider(bytes(32)), StoredKeyRows(self.db))
        keyring.ensure(self.scope.tenant)
        return ReportWriter(self.ledger, TransparencyLog(self.db, TenantSigner(keyring)))

    def open(self, run: str = "run_a", **more: object) -> Book:
        drawn_here = isinstance(self.event, SampledGaussian) and self.event.vouched_by == "server"
        if drawn_here and not self.ledger.entries(self.scope):
            self.register()
        terms: dict[str, object] = {
            "target_epsilon": self.target,
            "target_delta": self.delta,
            "unit": "datum",
            "accountant": self.accountant,
            "mechanism": self.event,
        }
        self.ledger.open_dataset(self.scope, run_id=run, **{**terms, **more})  # type: ignore[arg-type]
        return self

    def reserve(self, seq: int, run: str = "run_a", event: Event | None = None, **more: object) -> Reservation:
        return self.ledger.reserve(
            self.scope,
            run_id=run,
            seq=seq,
            event=event or self.event,
            **{"accountant": self.accountant, **more},  # type: ignore[arg-type]
        )

    def settle(self, paid: Reservation, outcome: str = "released") -> None:
        self.db.write(
            lambda tx: self.ledger.settle(tx, paid, outcome=outcome, update_hash="sha256:00")  # type: ignore[arg-type]
        )

    def verify(self) -> None:
        """Check the ledger as whoever is handed it does."""
        read_history(self.scope.dataset_id, (entry.body for entry in self.ledger.entries(self.scope)))

    def charges(self) -> int:
        return sum(entry.kind == "charge" for entry in self.ledger.entries(self.scope))

    def epsilon(self) -> float:
        return self.ledger.spent(self.scope).epsilon


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'ledger.db'}"


@pytest.fixture
def db(url: str) -> Iterator[Database]:
    database = Database.open(url)
    yield database
    database.close()


@pytest.fixture
def book(db: Database) -> Callable[..., Book]:
    """``book(target=4.0)`` is a ledger whose dataset is still to be opened."""
    return lambda **settings: Book(db, **settings)

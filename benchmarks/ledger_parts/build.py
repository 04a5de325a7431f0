"""Builds a ledger of any length with the ledger's own code, without a flush after each entry.

``reserve`` and ``settle`` run as they are; only the database under them commits many of their transactions at once.
The rows are those that a server would have written, one charge and one settlement for each step.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection

from tg_tinker_server.dp.events import Gaussian
from tg_tinker_server.ledger.privacy_ledger import PrivacyLedger
from tg_tinker_server.ledger.reservation import DatasetScope
from tg_tinker_server.store.database import Database

T = TypeVar("T")
SCOPE = DatasetScope(tenant="clinic", dataset_id="records")
EVENT = Gaussian(noise_multiplier=60.0)
TERMS: dict[str, Any] = {
    "target_epsilon": None,
    "target_delta": 1e-5,
    "unit": "datum",
    "accountant": "rdp",
    "mechanism": EVENT,
}
STEPS_OF_A_RUN = 5000
STEPS_OF_A_COMMIT = 2000


class OneTransaction:
    """The two verbs of :class:`Database` inside a transaction that is under way."""

    def __init__(self, tx: Connection) -> None:
        self._tx = tx

    def write(self, fn: Callable[[Connection], T]) -> T:
        return fn(self._tx)

    read = write


def extend(path: Path, entries: int, *, progress: Callable[[int], None] = lambda _: None) -> None:
    """Bring the ledger at ``path`` to ``entries`` entries, or a few more."""
    db = Database.open(f"sqlite:///{path}")
    ledger: PrivacyLedger | None = None

    def commit(tx: Connection) -> int:
        nonlocal ledger
        inside: Any = OneTransaction(tx)
        if ledger is None:
            ledger = PrivacyLedger(inside, clock=lambda: datetime.now(UTC))
        else:
            ledger._db = inside  # keeps its folds
        there = count(tx)
        for step in range(there // 2, min(there // 2 + STEPS_OF_A_COMMIT, (entries + 1) // 2)):
            run, seq = f"run_{step // STEPS_OF_A_RUN}", step % STEPS_OF_A_RUN + 1
            if seq == 1:
                ledger.open_dataset(SCOPE, run_id=run, **TERMS)
            paid = ledger.reserve(SCOPE, run_id=run, seq=seq, event=EVENT, accountant="rdp")
            ledger.settle(tx, paid, outcome="released", update_hash="sha256:" + 64 * "0")
        return count(tx)

    def count(tx: Connection) -> int:
        return int(tx.exec_driver_sql("SELECT count(*) FROM ledger WHERE kind != 'open'").scalar_one())

    there = 0
    while there < entries:
        there = db.write(commit)
        progress(there)
    db.close()


def copy(source: Path, target: Path) -> None:
    """A copy of a database that nobody else writes."""
    with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(target)) as new:
        old.backup(new)

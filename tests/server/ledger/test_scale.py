"""A ledger that grows makes its charges no slower, the server no larger, and nobody else wait."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from benchmarks.ledger_parts.build import EVENT, SCOPE, STEPS_OF_A_RUN, TERMS, copy, extend
from tests.support.log_tree import check_trees
from tg_tinker.ledger import verify_chain
from tg_tinker_server.dp.accounting import cost, epsilon, repeated
from tg_tinker_server.ledger.fold import Fold
from tg_tinker_server.ledger.folds import Folds
from tg_tinker_server.ledger.privacy_ledger import PrivacyLedger
from tg_tinker_server.store.database import Database

SHORT, LONG = 100, 3000


def open_ledger(path: Path) -> tuple[Database, PrivacyLedger]:
    db = Database.open(f"sqlite:///{path}")
    return db, PrivacyLedger(db, clock=lambda: datetime(2026, 1, 2, tzinfo=UTC))


def spend(db: Database, ledger: PrivacyLedger, seq: int, run: str = "new") -> None:
    paid = ledger.reserve(SCOPE, run_id=run, seq=seq, event=EVENT, accountant="rdp")
    db.write(lambda tx: ledger.settle(tx, paid, outcome="released", update_hash="sha256:" + 64 * "0"))


@pytest.fixture(scope="module")
def ledgers(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Databases by the number of their entries."""
    folder = tmp_path_factory.mktemp("ledgers")
    extend(folder / "grown.db", SHORT)
    copy(folder / "grown.db", folder / "short.db")
    extend(folder / "grown.db", LONG)
    return {SHORT: folder / "short.db", LONG: folder / "grown.db"}


def test_a_built_ledger_is_what_charging_one_by_one_writes(ledgers: dict[int, Path], tmp_path: Path) -> None:
    built_db, built = open_ledger(ledgers[SHORT])
    real_db, real = open_ledger(tmp_path / "l.db")
    real.open_dataset(SCOPE, run_id="run_0", **TERMS)
    for seq in range(1, SHORT // 2 + 1):
        spend(real_db, real, seq, "run_0")
    assert SHORT // 2 <= STEPS_OF_A_RUN
    entries = built.entries(SCOPE), real.entries(SCOPE)
    chained = ("time", "prev_hash")  # what moments and earlier entries decide
    plain = [[{k: v for k, v in e.body.items() if k not in chained} for e in some] for some in entries]
    assert plain[0] == plain[1]
    assert len(plain[0]) == SHORT + 1
    for some, db in zip(entries, (built_db, real_db), strict=True):
        verify_chain(some)
        db.close()
    assert check_trees(ledgers[SHORT]) == check_trees(tmp_path / "l.db") == SHORT + 1


def work_of_a_step(path: Path, tmp_path: Path) -> int:
    """How many instructions SQLite's machine runs for a charge and its settlement, in hundreds."""
    copy(path, tmp_path / path.name)
    db, ledger = open_ledger(tmp_path / path.name)
    counted = 0

    def count() -> int:
        nonlocal counted
        counted += 1
        return 0

    def watch(connection: Any, _record: object) -> None:
        connection.set_progress_handler(count, 100)

    for engine in (db._reader_engine, db._writer_engine):
        engine.dispose()
        sa.event.listen(engine, "connect", watch)
    ledger.open_dataset(SCOPE, run_id="new", **TERMS)
    spend(db, ledger, 1)
    before = counted
    for seq in range(2, 22):
        spend(db, ledger, seq)
    db.close()
    return counted - before


def test_a_charge_is_as_much_work_after_thousands_as_after_a_few(ledgers: dict[int, Path], tmp_path: Path) -> None:
    short, long = work_of_a_step(ledgers[SHORT], tmp_path), work_of_a_step(ledgers[LONG], tmp_path)
    assert 0 < long < 1.5 * short


def peak_bytes(fn: Callable[[], object]) -> int:
    tracemalloc.start()
    fn()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_reading_a_long_history_takes_no_more_memory_than_a_short_one(ledgers: dict[int, Path]) -> None:
    peaks = {}
    for entries, path in ledgers.items():
        db, _ = open_ledger(path)
        db.read(lambda tx: Folds().at(tx, SCOPE))  # fills caches that stay
        peaks[entries] = peak_bytes(lambda db=db: db.read(lambda tx: Folds().at(tx, SCOPE)))
        db.close()
    assert peaks[LONG] < peaks[SHORT] + 50_000
    rows = peak_bytes(lambda: list(range(1000, 4000)))
    assert rows > 50_000  # a list of three thousand numbers would have been seen


@pytest.mark.parametrize("first", ["reserve", "open_dataset"])
def test_a_history_that_is_new_to_the_server_is_not_read_while_others_wait(
    ledgers: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    copy(ledgers[LONG], tmp_path / "l.db")
    db, ledger = open_ledger(tmp_path / "l.db")
    read: dict[str, int] = {}
    extended = Fold.extended

    def counted(self: Fold, rows: Iterable[Any]) -> Fold:
        rows = list(rows)
        name = threading.current_thread().name
        read[name] = read.get(name, 0) + len(rows)
        return extended(self, rows)

    monkeypatch.setattr(Fold, "extended", counted)
    if first == "reserve":
        ledger.reserve(SCOPE, run_id="run_0", seq=LONG, event=EVENT, accountant="rdp")
    else:
        ledger.open_dataset(SCOPE, run_id="new", **TERMS)
    assert read == {threading.current_thread().name: LONG + 1}
    monkeypatch.undo()
    charges = LONG // 2 + (first == "reserve")
    assert ledger.spent(SCOPE).epsilon == epsilon(repeated(cost(EVENT), charges), TERMS["target_delta"])
    db.close()

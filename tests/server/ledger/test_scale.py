"""A ledger that grows makes its charges no slower, the server no larger, and nobody else wait."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from benchmarks.ledger_parts.build import EVENT, SCOPE, STEPS_OF_A_RUN, TERMS, copy, extend
from tests.support.log_tree import check_trees
from tests.support.work import calls_of, peak_bytes
from tg_tinker.ledger import verify_chain
from tg_tinker_server.dp.accounting import cost, epsilon, repeated
from tg_tinker_server.ledger.fold import Fold
from tg_tinker_server.ledger.folds import Folds
from tg_tinker_server.ledger.log import TransparencyLog
from tg_tinker_server.ledger.privacy_ledger import PrivacyLedger
from tg_tinker_server.store.database import Database

SHORT, LONG = 100, 2000


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


class Counter:
    """How many instructions SQLite's machine runs, in tens."""

    def __init__(self, db: Database) -> None:
        self.count = 0
        for engine in (db._reader_engine, db._writer_engine):
            engine.dispose()
            sa.event.listen(engine, "connect", self._watch)

    def _watch(self, connection: Any, _record: object) -> None:
        connection.set_progress_handler(self._add, 10)

    def _add(self) -> int:
        self.count += 1
        return 0

    def of(self, fn: Callable[[], object]) -> int:
        before = self.count
        fn()
        return self.count - before


def work_of_a_step(path: Path, tmp_path: Path) -> tuple[int, int]:
    """A charge and its settlement, twenty times: instructions of the database, calls of ours."""
    copy(path, tmp_path / path.name)
    db, ledger = open_ledger(tmp_path / path.name)
    counter = Counter(db)
    ledger.open_dataset(SCOPE, run_id="new", **TERMS)
    spend(db, ledger, 1)
    calls = 0

    def spend_all() -> None:
        nonlocal calls
        calls = calls_of(lambda: [spend(db, ledger, seq) for seq in range(2, 22)])

    work = counter.of(spend_all)
    db.close()
    return work, calls


def test_a_charge_is_as_much_work_after_thousands_as_after_a_few(ledgers: dict[int, Path], tmp_path: Path) -> None:
    short, long = work_of_a_step(ledgers[SHORT], tmp_path), work_of_a_step(ledgers[LONG], tmp_path)
    assert 0 < long[0] < 1.5 * short[0]
    assert 0 < long[1] < 1.5 * short[1]


def work_of_proofs(path: Path, entries: int) -> dict[str, int]:
    """Each kind of proof, for leaves and sizes in the middle."""
    db, _ = open_ledger(path)
    log = TransparencyLog(db, signers=None)  # type: ignore[arg-type]  # nothing is signed here
    counter = Counter(db)
    db.read(lambda tx: log.inclusion(tx, SCOPE.tenant, 0, 1))
    work: dict[str, Callable[[Any], object]] = {
        "inclusion": lambda tx: log.inclusion(tx, SCOPE.tenant, entries // 3, entries - 1),
        "consistency": lambda tx: log.consistency(tx, SCOPE.tenant, entries // 3, entries - 1),
        "subset": lambda tx: log.subset(tx, SCOPE.tenant, [3, entries // 3], entries - 1),
        "leaves": lambda tx: log.leaves(tx, SCOPE.tenant, entries // 3, 5),
    }
    counted = {name: counter.of(lambda fn=fn: db.read(fn)) for name, fn in work.items()}
    db.close()
    return counted


def test_a_proof_grows_with_the_height_of_the_tree_and_not_with_its_leaves(ledgers: dict[int, Path]) -> None:
    short, long = work_of_proofs(ledgers[SHORT], SHORT), work_of_proofs(ledgers[LONG], LONG)
    for proof, work in long.items():
        assert 0 < work < 3 * max(10, short[proof]), proof  # 12 levels against 7, 20 times as many leaves


def test_reading_a_long_history_takes_no_more_memory_than_a_short_one(ledgers: dict[int, Path]) -> None:
    peaks = {}
    for entries, path in ledgers.items():
        db, _ = open_ledger(path)
        db.read(lambda tx: Folds().at(tx, SCOPE))  # fills caches that stay
        peaks[entries] = peak_bytes(lambda db=db: db.read(lambda tx: Folds().at(tx, SCOPE)), tries=4)
        db.close()
    assert peaks[LONG] < peaks[SHORT] + 50_000
    rows = peak_bytes(lambda: list(range(1000, 3000)))
    assert rows > 50_000  # a list of two thousand numbers would have been seen


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

"""The database keeps what it said it kept."""

from __future__ import annotations

import sqlite3
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker_server.store import database as database_module
from tg_tinker_server.store import log_rows
from tg_tinker_server.store.database import Database
from tg_tinker_server.store.tables import audit, datasets, ledger, metadata

NOW = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)


@pytest.fixture
def db(tmp_path: Path):
    database = Database.open(f"sqlite:///{tmp_path}/t.db")
    yield database
    database.close()


def _insert(conn: sa.Connection, name: str) -> str:
    conn.execute(datasets.insert().values(tenant="t", dataset_id=name, unit="datum", target_delta=1e-5, created=NOW))
    return name


def _names(db: Database) -> list[str]:
    return list(db.read(lambda c: c.execute(sa.select(datasets.c.dataset_id)).scalars().all()))


def test_the_migrations_make_exactly_the_tables_that_the_code_expects(db: Database) -> None:
    def differences(conn: sa.Connection) -> list[object]:
        context = MigrationContext.configure(conn, opts={"compare_type": True})
        return list(compare_metadata(context, metadata))

    assert db.read(differences) == []


def test_connections_are_in_wal_mode_with_full_synchronisation(db: Database) -> None:
    def pragmas(conn: sa.Connection) -> tuple[str, int]:
        return (
            conn.exec_driver_sql("PRAGMA journal_mode").scalar_one(),
            conn.exec_driver_sql("PRAGMA synchronous").scalar_one(),
        )

    assert db.read(pragmas) == ("wal", 2)
    assert db.write(pragmas) == ("wal", 2)


def test_a_connection_that_cannot_keep_a_log_is_refused() -> None:
    memory = sqlite3.connect(":memory:")  # SQLite answers journal_mode=memory
    with pytest.raises(ServerError, match="journal_mode=memory"):
        database_module.make_durable(memory, read_only=False)


def test_a_database_without_full_synchronisation_does_not_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "_FULL", 3)  # ask for more than SQLite was told: EXTRA
    with pytest.raises(ServerError, match="synchronous=2"):
        Database.open(f"sqlite:///{tmp_path}/t.db")


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "postgresql://u:secret@h/d"])
def test_databases_that_cannot_be_checked_are_refused_without_showing_a_password(url: str) -> None:
    with pytest.raises(ServerError) as caught:
        Database.open(url)
    assert "secret" not in str(caught.value)


def test_what_was_written_is_there_after_reopening(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/t.db"
    first = Database.open(url)
    first.write(lambda c: _insert(c, "a"))
    first.close()
    second = Database.open(url)
    assert _names(second) == ["a"]
    assert second.read(lambda c: c.execute(sa.select(datasets.c.created)).scalar_one()) == NOW
    second.close()


def test_an_exception_rolls_back_and_reaches_the_caller(db: Database) -> None:
    def fail(conn: sa.Connection) -> None:
        _insert(conn, "a")
        raise InvalidRequestError("no")

    with pytest.raises(InvalidRequestError):
        db.write(fail)
    assert _names(db) == []


def test_a_write_that_fails_in_a_group_leaves_its_neighbours(db: Database) -> None:
    gate = threading.Event()
    blocker = db.submit(lambda c: gate.wait(60))  # while it runs, the next three gather in one group

    def fail(conn: sa.Connection) -> None:
        _insert(conn, "b")
        raise InvalidRequestError("no")

    futures = [
        db.submit(lambda c: _insert(c, "a")),
        db.submit(fail),
        db.submit(lambda c: _insert(c, "c")),
    ]
    gate.set()
    assert blocker.result(60)
    assert futures[0].result(60) == "a"
    assert isinstance(futures[1].exception(60), InvalidRequestError)
    assert futures[2].result(60) == "c"
    assert _names(db) == ["a", "c"]
    db.check_healthy()  # a refused request is not a lost write


def test_a_full_disk_in_a_group_fails_only_what_did_not_fit(db: Database) -> None:
    pages = db.read(lambda c: c.exec_driver_sql("PRAGMA page_count").scalar_one())

    def limit(dbapi_connection: sqlite3.Connection, _record: object) -> None:
        dbapi_connection.execute(f"PRAGMA max_page_count={pages + 2}")

    sa.event.listen(db._writer_engine, "connect", limit)
    with pytest.raises(ZeroDivisionError):
        db.write(lambda c: 1 / 0)  # an unexpected failure: the next write takes a fresh connection

    def big(conn: sa.Connection) -> None:
        conn.execute(
            datasets.insert().values(tenant="t", dataset_id="big", unit="x" * 200_000, target_delta=1e-5, created=NOW)
        )

    gate = threading.Event()
    db.submit(lambda c: gate.wait(60))
    before, full, after = (
        db.submit(lambda c: _insert(c, "a")),
        db.submit(big),
        db.submit(lambda c: _insert(c, "c")),
    )
    gate.set()
    assert before.result(60) == "a"
    assert isinstance(full.exception(60), ServerError)
    assert after.result(60) == "c"
    assert _names(db) == ["a", "c"]
    with pytest.raises(ServerError, match="lost a write"):
        db.check_healthy()


def test_a_commit_that_fails_is_told_to_every_waiting_caller_and_remembered(db: Database) -> None:
    def broken(_conn: sa.Connection) -> None:
        raise OSError(5, "Input/output error")

    sa.event.listen(db._writer_engine, "commit", broken)
    with pytest.raises(OSError, match="Input/output"):
        db.write(lambda c: _insert(c, "a"))
    db.check_healthy()  # whoever waited was told
    assert isinstance(db.submit(lambda c: _insert(c, "b")).exception(60), OSError)
    with pytest.raises(ServerError, match="lost a write"):
        db.check_healthy()
    sa.event.remove(db._writer_engine, "commit", broken)
    assert _names(db) == []


def test_errors_of_the_database_do_not_show_parameters(db: Database) -> None:
    db.write(lambda c: _insert(c, "a-secret-name"))
    with pytest.raises(ServerError) as caught:
        db.write(lambda c: _insert(c, "a-secret-name"))
    assert "a-secret-name" not in str(caught.value)


def test_readers_cannot_write(db: Database) -> None:
    with pytest.raises(ServerError, match="readonly"):
        db.read(lambda c: _insert(c, "a"))


def test_a_write_inside_a_write_is_refused_rather_than_waiting_for_itself(db: Database) -> None:
    with pytest.raises(RuntimeError, match="inside a write"):
        db.write(lambda c: db.write(lambda d: None))


def test_a_closed_database_says_so(tmp_path: Path) -> None:
    db = Database.open(f"sqlite:///{tmp_path}/t.db")
    pending = [db.submit(lambda c, i=i: _insert(c, str(i))) for i in range(100)]
    db.close()
    assert [f.result(0) for f in pending] == [str(i) for i in range(100)]
    with pytest.raises(ServerError, match="closed"):
        db.write(lambda c: None)
    db.close()


def test_many_threads_write_without_losing_one(db: Database) -> None:
    threads = [
        threading.Thread(target=lambda t=t: [db.write(lambda c, i=i: _insert(c, f"{t}-{i}")) for i in range(20)])
        for t in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(_names(db)) == 160


def test_two_servers_may_create_the_same_database_at_once(tmp_path: Path) -> None:
    opened: list[Database] = []
    threads = [
        threading.Thread(target=lambda: opened.append(Database.open(f"sqlite:///{tmp_path}/t.db"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 4
    for database in opened:
        database.close()


def _append(conn: sa.Connection, position: int, name: str = "d", run: str = "r") -> None:
    conn.execute(
        ledger.insert().values(
            tenant="t",
            dataset_id=name,
            position=position,
            kind="charge",
            run_id=run,
            seq=position,
            attempt=1,
            body_json="{}",
            prev_hash=b"",
            entry_hash=b"",
            leaf_index=position,
        )
    )


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE ledger SET body_json = 'x'",
        "DELETE FROM ledger",
        "INSERT OR REPLACE INTO ledger SELECT * FROM ledger WHERE position = 0",
        "INSERT INTO ledger SELECT tenant, dataset_id, 5, kind, run_id, 5, attempt, body_json, prev_hash, "
        "entry_hash, 5 FROM ledger WHERE position = 0",
    ],
)
def test_the_ledger_can_only_be_added_to_at_its_end(db: Database, statement: str) -> None:
    db.write(lambda c: _append(c, 0))
    db.write(lambda c: _append(c, 1))
    db.write(lambda c: _append(c, 0, name="another"))
    with pytest.raises(ServerError, match="append-only"):
        db.write(lambda c: c.exec_driver_sql(statement))


@pytest.mark.parametrize("statement", ["UPDATE audit SET body_json = 'x'", "DELETE FROM audit"])
def test_the_audit_log_can_only_be_added_to(db: Database, statement: str) -> None:
    row = {"tenant": "t", "position": 0, "body_json": "{}", "prev_hash": b"", "record_hash": b"", "leaf_index": 0}
    db.write(lambda c: c.execute(audit.insert().values(row)))
    with pytest.raises(ServerError, match="append-only"):
        db.write(lambda c: c.exec_driver_sql(statement))


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE log_nodes SET hash = x'00'",
        "DELETE FROM log_nodes",
        "INSERT OR REPLACE INTO log_nodes SELECT tenant, level, idx, x'00' FROM log_nodes WHERE idx = 0",
        "INSERT INTO log_nodes SELECT tenant, level, 7, hash FROM log_nodes WHERE idx = 0",
    ],
)
def test_the_tree_can_only_grow_at_its_end(db: Database, statement: str) -> None:
    db.write(lambda c: log_rows.insert_nodes(c, "t", {(0, 0): b"a"}))
    db.write(lambda c: log_rows.insert_nodes(c, "t", {(0, 1): b"b", (1, 0): b"ab"}))
    with pytest.raises(ServerError, match="append-only"):
        db.write(lambda c: c.exec_driver_sql(statement))


def test_a_time_without_a_zone_is_not_stored(db: Database) -> None:
    def naive(conn: sa.Connection) -> None:
        conn.execute(
            datasets.insert().values(
                tenant="t", dataset_id="d", unit="datum", target_delta=1e-5, created=NOW.replace(tzinfo=None)
            )
        )

    with pytest.raises(ServerError, match="timezone"):
        db.write(naive)

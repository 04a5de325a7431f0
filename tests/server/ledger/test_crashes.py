"""A reservation that was handed out is on disk, whatever happens to the process, the disk or the commit."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tests.support.log_tree import check_trees
from tg_tinker_server.dp.accounting import cost, epsilon, repeated

Books = Callable[..., Any]


def run(script: str, *args: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-m", f"tests.server.ledger.{script}", *args],
        capture_output=True,
        text=True,
        timeout=1700,
        check=False,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, done.stderr
    seen: dict[str, int] = json.loads(done.stdout)
    return seen


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("writers", [1, 2])
@pytest.mark.parametrize("kills", [6, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_reservation_that_was_handed_out_is_lost_when_its_process_is_killed(
    tmp_path: Path, kills: int, writers: int
) -> None:
    seen = run("kill_loop", str(tmp_path), str(kills), "20260102", str(writers))
    assert seen["kills"] == kills
    assert seen["told"] >= kills  # each was told of one charge, then killed somewhere inside a stream of them
    assert seen["lost"] == 0
    assert seen["most_unheard"] <= 1  # charged, and killed before the caller heard of it: over-counted, never under


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("UPDATE log_nodes SET hash = zeroblob(32) WHERE level = 1 AND idx = 0", "not those of its 4 entries"),
        ("DELETE FROM log_nodes WHERE level = 2", "not those of its 4 entries"),
        ("UPDATE ledger SET body_json = body_json || ' ' WHERE leaf_index = 2", "not those of its 4 entries"),
        ("DELETE FROM ledger WHERE leaf_index = 1", "not leaves 0 to 2"),
        ("DELETE FROM log_nodes", "but trees of"),
    ],
)
def test_the_check_of_the_tree_sees_a_node_or_an_entry_that_is_wrong(
    book: Books, tmp_path: Path, change: str, message: str
) -> None:
    b = book().open()
    for seq in (1, 2, 3):
        b.reserve(seq)
    assert check_trees(tmp_path / "ledger.db") == 4
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.db")) as connection:
        for (trigger,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {trigger}")
        connection.execute(change)
        connection.commit()
    with pytest.raises(AssertionError, match=message):
        check_trees(tmp_path / "ledger.db")


def test_a_full_disk_hands_out_nothing_that_is_not_on_it(tmp_path: Path) -> None:
    seen = run("full_disk", str(tmp_path / "l.db"))
    assert seen["refused"] > 0
    assert seen["refused_later"] == 0  # with space again, the same process goes on
    assert seen["lost"] == 0
    assert seen["told"] == seen["charged"]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), sqlite3.OperationalError("disk I/O error")])
def test_a_commit_that_fails_hands_out_no_reservation(book: Books, error: Exception) -> None:
    b = book().open()
    b.reserve(1)

    def broken(_connection: sa.Connection) -> None:
        raise error

    sa.event.listen(b.db._writer_engine, "commit", broken)
    for _ in range(3):
        with pytest.raises(Exception, match=r"I/O|Input/output"):
            b.reserve(2)
    sa.event.remove(b.db._writer_engine, "commit", broken)
    assert b.charges() == 1
    assert b.reserve(2).attempt == 1  # nothing of the refused ones was kept, in the rows or in memory
    assert b.epsilon() == epsilon(repeated(cost(b.event), 2), b.delta)


def test_an_attempt_that_a_later_one_replaced_cannot_be_settled(book: Books) -> None:
    b = book().open()
    first = b.reserve(1)
    second = b.reserve(1)
    with pytest.raises(Exception, match="charged again"):
        b.settle(first)
    b.settle(second)
    assert [(e.kind, e.body.get("attempt")) for e in b.ledger.entries(b.scope)][1:] == [
        ("charge", 1),
        ("charge", 2),
        ("settle", 2),
    ]


def test_a_settlement_stands_and_falls_with_the_callers_transaction(book: Books) -> None:
    b = book().open()
    paid = b.reserve(1)

    def fails(tx: sa.Connection) -> None:
        b.ledger.settle(tx, paid, outcome="released", update_hash="sha256:00")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        b.db.write(fails)
    assert [e.kind for e in b.ledger.entries(b.scope)] == ["open", "charge"]
    b.settle(paid)
    assert [e.kind for e in b.ledger.entries(b.scope)] == ["open", "charge", "settle"]

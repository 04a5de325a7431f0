"""What the ledger remembers decides nothing: the rows do."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from tg_tinker.errors import ResourceNotFoundError, ServerError
from tg_tinker.ledger import LEDGER_DOMAIN, ChainEntry
from tg_tinker_server.dp.accounting import cost, epsilon, repeated
from tg_tinker_server.ledger import folds as folds_module
from tg_tinker_server.ledger import log
from tg_tinker_server.ledger.fold import Fold
from tg_tinker_server.store import ledger_rows as rows
from tg_tinker_server.store.database import Database

Books = Callable[..., Any]


def spent(n: int, b: Any) -> float:
    return epsilon(repeated(cost(b.event), n), b.delta)


def all_rows(b: Any) -> list[rows.LedgerRow]:
    found: list[rows.LedgerRow] = b.db.read(lambda tx: rows.entries_from(tx, b.scope.tenant, b.scope.dataset_id, 0))
    return found


def test_another_server_on_the_same_database_is_noticed_at_once(book: Books, url: str) -> None:
    here = book().open()
    here.reserve(1)
    other_db = Database.open(url)
    there = type(here)(other_db)
    assert there.reserve(1, run="run_b").epsilon_before == spent(1, here)
    assert here.reserve(2).epsilon_before == spent(2, here)
    assert there.epsilon() == here.epsilon() == spent(3, here)
    other_db.close()


def test_folding_on_and_folding_afresh_come_to_the_same(book: Books) -> None:
    b = book().open().open(run="run_b")
    b.settle(b.reserve(1))
    b.settle(b.reserve(1, run="run_b"), "failed")
    b.reserve(2)
    b.reserve(2)
    found = all_rows(b)
    afresh = Fold().extended(found)
    for cut in range(len(found)):
        onward = Fold().extended(found[:cut]).extended(found[cut:])
        for f in fields(Fold):
            assert np.all(getattr(onward, f.name) == getattr(afresh, f.name)), f.name
    assert afresh.run("run_a").retries == 1


def test_a_fold_is_never_changed_by_what_comes_after_it(book: Books) -> None:
    b = book().open()
    b.reserve(1)
    early = Fold().extended(all_rows(b))
    before = (early.position, early.total.copy(), dict(early.runs))
    for seq in range(2, 5):
        b.reserve(seq)
    early.extended(all_rows(b)[early.position + 1 :])
    assert (early.position, dict(early.runs)) == (before[0], before[2])
    assert (early.total == before[1]).all()


def test_writes_that_share_a_commit_see_each_other(book: Books) -> None:
    b = book(target=4.0).open()
    gate = threading.Event()
    b.db.submit(lambda tx: gate.wait(60))
    threads = [threading.Thread(target=b.reserve, args=(seq,)) for seq in range(1, 4)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)  # all three wait for the writer now, and will share its next commit
    gate.set()
    for thread in threads:
        thread.join()
    assert b.epsilon() == spent(3, b)


def test_memory_is_bounded_and_forgetting_costs_nothing_but_time(
    book: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folds_module, "KEPT", 2)
    b = book()
    scopes = [type(b.scope)("t", f"data-{i}") for i in range(5)]
    for scope in scopes:
        b.scope = scope
        b.open().reserve(1)
    assert len(b.ledger._folds._known) == 2
    for scope in scopes:
        b.scope = scope
        assert b.epsilon() == spent(1, b)


def test_a_dataset_of_another_tenant_is_not_there(book: Books) -> None:
    b = book().open()
    b.reserve(1)
    b.scope = type(b.scope)("someone-else", b.scope.dataset_id)
    for ask in (b.epsilon, lambda: b.reserve(1)):
        with pytest.raises(ResourceNotFoundError, match="no such dataset for this tenant"):
            ask()
    assert b.ledger.entries(b.scope) == []


FORGED: list[dict[str, Any]] = [
    {"kind": "charge", "event": {"kind": "quantum_gaussian", "noise_multiplier": "1.0"}},
    {"kind": "charge", "event": {"kind": "gaussian", "noise_multiplier": "1.0", "discount": "0.5"}},
    {"kind": "charge", "event": {"kind": "gaussian"}},
    {"kind": "charge", "event": None},
    {"kind": "charge", "accountant": "gdp"},
    {"kind": "charge", "accountant": "prv"},
    {"kind": "refund"},
    {"kind": "settle", "outcome": "refunded"},
    {"kind": "open", "target_epsilon": "100.0"},
    {"kind": "open", "target_epsilon": "nan"},
]


@pytest.mark.parametrize("forged", FORGED, ids=lambda f: json.dumps(f)[:60])
def test_an_entry_that_is_not_understood_stops_the_dataset_instead_of_costing_zero(
    book: Books, forged: dict[str, Any]
) -> None:
    # Even with its hash in order, as a newer server or a forger would write it.
    b = book().open()
    b.reserve(1)
    opening, charge = b.ledger.entries(b.scope)
    body = {**opening.body, **charge.body, **forged}
    kept = {k: v for k, v in body.items() if k not in ("position", "prev_hash")}
    entry = ChainEntry.make(LEDGER_DOMAIN, {**kept, "seq": 2, "attempt": 1}, position=2, prev_hash=charge.entry_hash)

    def insert(tx: Any) -> None:
        row = rows.LedgerRow(
            tenant="t",
            dataset_id="data-1",
            position=2,
            kind=str(forged["kind"]),
            run_id="run_a",
            seq=2,
            attempt=1,
            body_json=entry.body_json(),
            prev_hash=entry.prev_hash,
            entry_hash=entry.entry_hash,
            leaf_index=log.append(tx, "t", entry.body_json()),
        )
        rows.insert_entry(tx, row)

    b.db.write(insert)
    for ask in (b.epsilon, lambda: b.reserve(3)):
        with pytest.raises(ServerError, match="position 2"):
            ask()


@pytest.mark.parametrize("column", ["kind", "run_id", "seq", "attempt", "entry_hash", "body_json"])
def test_a_row_whose_columns_disagree_with_its_hash_is_named(book: Books, column: str) -> None:
    b = book().open()
    for seq in range(1, 4):
        b.settle(b.reserve(seq))
    new = {"kind": "'open'", "run_id": "'x'", "seq": "77", "attempt": "9", "entry_hash": "x'00'"}.get(
        column, "replace(body_json, '1.0', '9.0')"
    )

    def tamper(tx: Any) -> None:
        tx.exec_driver_sql("DROP TRIGGER ledger_no_update")
        tx.exec_driver_sql(f"UPDATE ledger SET {column} = {new} WHERE position = 3")

    b.db.write(tamper)
    with pytest.raises(ServerError, match="position 3"):
        type(b)(b.db).epsilon()

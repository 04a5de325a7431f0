"""The ledger's promises: charged before released, shared by all runs of a dataset, never given back."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa

from tg_tinker.errors import DPBudgetExceededError, InvalidRequestError, ServerError
from tg_tinker.ledger import PrivacyLedger as ClientLedger
from tg_tinker.ledger import verify_chain
from tg_tinker_server.dp.accounting import cost, epsilon, repeated
from tg_tinker_server.dp.events import Event, Gaussian, ParticipationGaussian, SampledGaussian, Unnoised
from tg_tinker_server.ledger.privacy_ledger import PrivacyLedger
from tg_tinker_server.ledger.reservation import DatasetScope, Reservation
from tg_tinker_server.store.database import Database

SCOPE = DatasetScope(tenant="t", dataset_id="data-1")
EVENT = SampledGaussian(noise_multiplier=1.0, sample_rate=0.1, vouched_by="client")
DELTA = 1e-5


def clock() -> datetime:
    return datetime(2026, 1, 2, tzinfo=UTC)


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    database = Database.open(f"sqlite:///{tmp_path / 'l.db'}")
    yield database
    database.close()


def opened(db: Database, *, target: float | None = 8.0, run: str = "run_a", event: Event = EVENT) -> PrivacyLedger:
    ledger = PrivacyLedger(db, clock=clock)
    ledger.open_dataset(
        SCOPE, run_id=run, target_epsilon=target, target_delta=DELTA, unit="datum", accountant="rdp", mechanism=event
    )
    return ledger


def reserve(
    ledger: PrivacyLedger, seq: int, *, run: str = "run_a", event: Event = EVENT, **more: object
) -> Reservation:
    return ledger.reserve(SCOPE, run_id=run, seq=seq, event=event, accountant="rdp", **more)  # type: ignore[arg-type]


def settle(db: Database, ledger: PrivacyLedger, paid: Reservation, outcome: str = "released") -> None:
    db.write(lambda tx: ledger.settle(tx, paid, outcome=outcome, update_hash="sha256:00"))  # type: ignore[arg-type]


def test_the_steps_telescope_to_the_total_and_the_total_is_the_fold(db: Database) -> None:
    ledger = opened(db)
    spent = 0.0
    for seq in range(1, 6):
        paid = reserve(ledger, seq)
        spent += paid.epsilon_after - paid.epsilon_before
        settle(db, ledger, paid)
    total = ledger.spent(SCOPE).epsilon
    assert total == pytest.approx(spent, abs=1e-9)
    assert total == epsilon(repeated(cost(EVENT), 5), DELTA)


def test_a_step_over_the_target_is_refused_with_numbers_and_nothing_is_written(db: Database) -> None:
    ledger = opened(db, target=4.0)
    seq = 1
    while epsilon(repeated(cost(EVENT), seq), DELTA) <= 4.0:
        reserve(ledger, seq)
        seq += 1
    with pytest.raises(
        DPBudgetExceededError, match=r"step would bring data-1 to epsilon 4\.\d+, over its 4\.000"
    ) as e:
        reserve(ledger, seq)
    assert seq > 3
    entries = ledger.entries(SCOPE)
    assert len([x for x in entries if x.kind == "charge"]) == seq - 1
    assert e.value.current_epsilon == ledger.spent(SCOPE).epsilon <= e.value.max_epsilon == 4.0
    assert e.value.delta == DELTA


def test_two_runs_over_one_dataset_share_its_budget(db: Database) -> None:
    ledger = opened(db, target=4.0)
    reserve(ledger, 1)
    opened(db, target=4.0, run="run_b")
    second = reserve(ledger, 1, run="run_b")
    assert second.epsilon_before == epsilon(cost(EVENT), DELTA)
    assert second.epsilon_after == epsilon(repeated(cost(EVENT), 2), DELTA)


@pytest.mark.parametrize("change", [{"target_epsilon": 9.0}, {"target_delta": 1e-6}, {"unit": "user"}])
def test_a_second_run_cannot_bring_its_own_terms(db: Database, change: dict[str, object]) -> None:
    ledger = opened(db)
    terms = {"target_epsilon": 8.0, "target_delta": DELTA, "unit": "datum", **change}
    with pytest.raises(InvalidRequestError, match="data-1 has target epsilon 8"):
        ledger.open_dataset(SCOPE, run_id="run_b", accountant="rdp", mechanism=EVENT, **terms)  # type: ignore[arg-type]


def test_a_run_that_could_not_take_one_step_is_refused_when_it_is_created(db: Database) -> None:
    with pytest.raises(DPBudgetExceededError):
        opened(db, target=0.1, event=Gaussian(noise_multiplier=0.5))


def test_everything_spent_is_still_spent_after_reopening(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'l.db'}"
    db = Database.open(url)
    ledger = opened(db)
    settle(db, ledger, reserve(ledger, 1))
    reserve(ledger, 2)  # a crash comes here
    before = ledger.spent(SCOPE)
    db.close()
    db = Database.open(url)
    again = PrivacyLedger(db, clock=clock)
    assert again.spent(SCOPE) == before
    with pytest.raises(ServerError, match="released before"):
        reserve(again, 1)
    retried = reserve(again, 2)
    assert retried.attempt == 2
    assert retried.epsilon_before == before.epsilon  # the lost attempt stays charged
    settle(db, again, retried)
    assert [e.body["attempt"] for e in again.entries(SCOPE) if e.kind == "charge"] == [1, 1, 2]
    db.close()


def test_a_failed_release_is_noted_and_never_refunded(db: Database) -> None:
    ledger = opened(db)
    paid = reserve(ledger, 1)
    settle(db, ledger, paid, "failed")
    assert ledger.spent(SCOPE).epsilon == paid.epsilon_after
    assert reserve(ledger, 1).attempt == 2


def test_a_charge_is_settled_once(db: Database) -> None:
    ledger = opened(db)
    paid = reserve(ledger, 1)
    settle(db, ledger, paid)
    with pytest.raises(ServerError):
        settle(db, ledger, paid)


def test_only_the_ledger_makes_reservations(db: Database) -> None:
    paid = reserve(opened(db), 1)
    with pytest.raises(TypeError):
        Reservation(
            scope=SCOPE, run_id="r", seq=1, attempt=1, event=EVENT, accountant="rdp", leaf=paid.leaf,
            epsilon_before=0.0, epsilon_after=0.0, delta=DELTA, mint=object(),
        )  # fmt: skip
    assert paid.event == EVENT


def test_threads_never_spend_more_than_the_target(db: Database) -> None:
    ledger = opened(db, target=4.0)
    refused = []

    def spend(run: str) -> None:
        for seq in range(1, 60):
            try:
                reserve(ledger, seq, run=run)
            except DPBudgetExceededError:
                refused.append(run)
                return

    threads = [threading.Thread(target=spend, args=(f"run_{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 4
    spent = ledger.spent(SCOPE).epsilon
    charges = len([e for e in ledger.entries(SCOPE) if e.kind == "charge"])
    assert spent == epsilon(repeated(cost(EVENT), charges), DELTA) <= 4.0
    assert epsilon(repeated(cost(EVENT), charges + 1), DELTA) > 4.0


def _spend_in_a_process(url: str, run: str) -> None:
    db = Database.open(url)
    ledger = PrivacyLedger(db, clock=clock)
    for seq in range(1, 200):
        try:
            reserve(ledger, seq, run=run)
        except DPBudgetExceededError:
            break
    db.close()


def test_two_processes_never_spend_more_than_the_target(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'l.db'}"
    db = Database.open(url)
    ledger = opened(db, target=4.0)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_spend_in_a_process, args=(url, f"run_{i}")) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    charges = len([e for e in ledger.entries(SCOPE) if e.kind == "charge"])
    assert epsilon(repeated(cost(EVENT), charges), DELTA) <= 4.0 < epsilon(repeated(cost(EVENT), charges + 1), DELTA)
    verify_chain(ledger.entries(SCOPE))
    db.close()


@pytest.mark.parametrize("what", ["edit", "remove", "unknown event"])
def test_a_ledger_that_was_tampered_with_stops_every_release(tmp_path: Path, what: str) -> None:
    url = f"sqlite:///{tmp_path / 'l.db'}"
    db = Database.open(url)
    ledger = opened(db)
    for seq in range(1, 5):
        settle(db, ledger, reserve(ledger, seq))
    whole = ledger.entries(SCOPE)
    db.close()
    raw = sa.create_engine(url)
    with raw.begin() as tx:
        tx.exec_driver_sql("DROP TRIGGER IF EXISTS ledger_no_update")
        tx.exec_driver_sql("DROP TRIGGER IF EXISTS ledger_no_delete")
        triggers = tx.exec_driver_sql("SELECT name FROM sqlite_master WHERE type='trigger'").scalars().all()
        for name in triggers:
            tx.exec_driver_sql(f"DROP TRIGGER {name}")
        if what == "edit":
            tx.exec_driver_sql("UPDATE ledger SET body_json = replace(body_json, '0.1', '0.01') WHERE position = 3")
        elif what == "remove":
            tx.exec_driver_sql("DELETE FROM ledger WHERE position = 3")
        else:
            tx.exec_driver_sql(
                "UPDATE ledger SET body_json = replace(body_json, 'sampled_', 'quantum_') WHERE position=3"
            )
    db = Database.open(url)
    broken = PrivacyLedger(db, clock=clock)
    with pytest.raises(ServerError, match=r"position [34]"):
        reserve(broken, 9)
    with pytest.raises(InvalidRequestError) as caught:
        verify_chain(broken.entries(SCOPE))
    assert caught.value.details["position"] == 3
    verify_chain(whole)
    db.close()


def test_one_epoch_over_disjoint_batches_costs_one_release(db: Database) -> None:
    event = ParticipationGaussian(noise_multiplier=1.0, releases=1)
    ledger = opened(db, event=event, target=20.0)
    one = epsilon(cost(Gaussian(noise_multiplier=1.0)), DELTA)
    for seq in range(1, 6):
        units = [f"u{seq}-{i}".encode() for i in range(4)]
        paid = reserve(ledger, seq, event=event, unit_macs=units, max_participation=2)
        assert paid.epsilon_after == one
    again = reserve(ledger, 6, event=event, unit_macs=[b"u1-0"], max_participation=2)
    assert again.epsilon_after == epsilon(repeated(cost(Gaussian(noise_multiplier=1.0)), 2), DELTA)
    with pytest.raises(InvalidRequestError, match="max_participation=2"):
        reserve(ledger, 7, event=event, unit_macs=[b"u1-0", b"u9"], max_participation=2)
    fresh = reserve(ledger, 7, event=event, unit_macs=[b"u9"], max_participation=2)
    assert fresh.epsilon_after == again.epsilon_after


def test_an_unnoised_release_voids_the_dataset_for_every_run(db: Database) -> None:
    ledger = opened(db, target=None)
    assert reserve(ledger, 1, event=Unnoised()).epsilon_after == float("inf")
    assert reserve(ledger, 1, run="run_b").epsilon_after == float("inf")


def test_the_client_verifies_the_ledger_that_the_server_hands_out(db: Database) -> None:
    ledger = opened(db)
    for seq in (1, 2):
        settle(db, ledger, reserve(ledger, seq))
    lines = [e.to_json() for e in ledger.entries(SCOPE)]

    def read(texts: list[str]) -> ClientLedger:
        return ClientLedger.from_lines("data-1", texts, epsilon_spent=1.0, target_epsilon=8.0, delta=DELTA)

    read(lines).verify()
    for broken in (lines[1:], lines[:2] + lines[3:], [*lines[:2], lines[3], lines[2], *lines[4:]]):
        with pytest.raises(InvalidRequestError, match="position"):
            read(broken).verify()

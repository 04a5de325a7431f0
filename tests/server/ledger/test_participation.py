"""Counted participation: one epoch costs one release, and no unit is ever in more releases than were paid for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tg_tinker.errors import DPUnsupportedError, InvalidRequestError
from tg_tinker_server.dp.accounting import cost, epsilon, repeated
from tg_tinker_server.dp.events import Gaussian, ParticipationGaussian
from tg_tinker_server.ledger.privacy_ledger import PrivacyLedger
from tg_tinker_server.ledger.reservation import DatasetScope
from tg_tinker_server.store import ledger_rows
from tg_tinker_server.store.database import Database

EVENT = ParticipationGaussian(noise_multiplier=2.0, releases=1)
ONE = cost(Gaussian(noise_multiplier=2.0))
DELTA = 1e-5
Books = Callable[..., Any]


def k_fold(k: int) -> float:
    return epsilon(repeated(ONE, k), DELTA)


def test_one_epoch_over_disjoint_batches_costs_one_release_and_two_epochs_two(book: Books) -> None:
    b = book(event=EVENT, target=20.0).open()
    for epoch in (1, 2):
        for batch in range(5):
            units = [f"unit-{batch}-{i}".encode() for i in range(3)]
            paid = b.reserve(10 * epoch + batch, unit_macs=units, max_participation=2)
            assert paid.epsilon_after == k_fold(epoch)
            assert paid.event.releases == (batch == 0)
    assert b.ledger.participation(b.scope, "run_a") == 2


@settings(max_examples=25, deadline=None)
@given(batches=st.lists(st.lists(st.sampled_from("abcdef"), max_size=5), min_size=1, max_size=8))
def test_the_charge_is_the_k_fold_release_of_the_busiest_unit(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[str]]
) -> None:
    db = Database.open(f"sqlite:///{tmp_path_factory.mktemp('p')}/l.db")
    b = _book(db)
    counts: Counter[str] = Counter()
    for seq, batch in enumerate(batches, start=1):
        paid = b.reserve(
            DatasetScope("t", "d"), run_id="r", seq=seq, event=EVENT, accountant="rdp",
            unit_macs=[u.encode() for u in batch], max_participation=99,
        )  # fmt: skip
        counts.update(set(batch))
        assert paid.epsilon_after == k_fold(max(counts.values(), default=1))  # a count begins by costing one
    db.close()


def _book(db: Database) -> PrivacyLedger:
    from datetime import UTC, datetime

    ledger = PrivacyLedger(db, clock=lambda: datetime(2026, 1, 2, tzinfo=UTC))
    ledger.open_dataset(
        DatasetScope("t", "d"), run_id="r", target_epsilon=None, target_delta=DELTA, unit="datum", accountant="rdp",
        mechanism=EVENT,
    )  # fmt: skip
    return ledger


def test_over_participation_is_refused_and_leaves_no_trace(book: Books) -> None:
    b = book(event=EVENT, target=20.0).open()
    b.reserve(1, unit_macs=[b"a", b"b"], max_participation=1)
    with pytest.raises(InvalidRequestError, match="1 privacy units would take part in more than max_participation=1"):
        b.reserve(2, unit_macs=[b"a", b"c"], max_participation=1)
    assert b.charges() == 1
    paid = b.reserve(2, unit_macs=[b"c"], max_participation=1)  # c was not counted by the refused step
    assert paid.event.releases == 0
    assert b.epsilon() == k_fold(1)


def test_counts_survive_a_restart(book: Books, url: str) -> None:
    b = book(event=EVENT, target=20.0).open()
    b.settle(b.reserve(1, unit_macs=[b"a"], max_participation=1))
    again = Database.open(url)
    with pytest.raises(InvalidRequestError):
        type(b)(again, event=EVENT, target=20.0).reserve(2, unit_macs=[b"a"], max_participation=1)
    again.close()


def test_a_step_lost_in_a_crash_is_paid_twice_but_does_not_use_up_its_units(book: Books) -> None:
    b = book(event=EVENT, target=20.0).open()
    b.reserve(1, unit_macs=[b"a", b"b"], max_participation=1)  # a crash comes here
    retried = b.reserve(1, unit_macs=[b"a", b"b"], max_participation=1)
    assert (retried.attempt, retried.event.releases) == (2, 1)
    assert b.epsilon() == k_fold(2)


def test_two_runs_count_apart_and_pay_together(book: Books) -> None:
    b = book(event=EVENT, target=20.0).open().open(run="run_b")
    b.reserve(1, unit_macs=[b"a"], max_participation=1)
    b.reserve(1, run="run_b", unit_macs=[b"a"], max_participation=1)
    assert b.epsilon() == k_fold(2)


def test_one_count_never_prices_two_noise_multipliers(book: Books) -> None:
    # Otherwise a step over fresh units with hardly any noise would ride on a count raised under much noise.
    b = book(event=EVENT, target=200.0).open()
    b.reserve(1, unit_macs=[b"a"], max_participation=3)
    quiet = ParticipationGaussian(noise_multiplier=0.5, releases=1)
    with pytest.raises(DPUnsupportedError, match="noise multiplier 2"):
        b.reserve(2, event=quiet, unit_macs=[b"b"], max_participation=3)


def test_an_empty_batch_is_released_and_costs_nothing_more(book: Books) -> None:
    # The first step of a count costs a release whoever is in it, so that no reader need believe in one that is free.
    b = book(event=EVENT, target=20.0).open()
    assert b.reserve(1, max_participation=1).epsilon_after == k_fold(1)
    assert b.reserve(2, unit_macs=[b"a"], max_participation=1).epsilon_after == k_fold(1)
    assert b.reserve(3, max_participation=1).epsilon_after == k_fold(1)
    b.verify()


def test_thousands_of_units_are_counted_in_one_step(book: Books) -> None:
    b = book(event=EVENT, target=20.0).open()
    units = [f"u{i}".encode() for i in range(3000)]
    assert b.reserve(1, unit_macs=units, max_participation=2).event.releases == 1
    assert b.reserve(2, unit_macs=units, max_participation=2).event.releases == 1
    with pytest.raises(InvalidRequestError, match="3000 privacy units"):
        b.reserve(3, unit_macs=units, max_participation=2)


def test_participation_without_a_limit_has_no_price(book: Books, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_participation"):
        book(event=EVENT, target=20.0).open().reserve(1)


def test_a_run_names_its_units_in_one_way_for_its_whole_life(book: Books) -> None:
    b = book(event=EVENT, target=20.0).open().open(run="run_b")
    b.reserve(1, unit_macs=[b"a"], unit_naming="ids", max_participation=9)
    with pytest.raises(InvalidRequestError, match="knows units by ids, and this batch by the content of datums"):
        b.reserve(2, unit_macs=[b"b"], unit_naming="the content of datums", max_participation=9)
    assert b.charges() == 1
    assert b.reserve(2, unit_macs=[b"b"], unit_naming="ids", max_participation=9).event.releases == 0
    b.reserve(1, run="run_b", unit_macs=[b"a"], unit_naming="the content of datums", max_participation=9)


def test_an_empty_step_settles_nothing_about_names(book: Books) -> None:
    b = book(event=EVENT, target=20.0).open()
    b.reserve(1, unit_naming="ids", max_participation=9)
    assert b.reserve(2, unit_macs=[b"a"], unit_naming="their prompts", max_participation=9).event.releases == 0


def test_counts_of_which_nobody_kept_the_names_are_not_added_to(book: Books) -> None:
    """As in a run that an older server counted."""
    b = book(event=EVENT, target=20.0).open()
    b.db.write(lambda tx: ledger_rows.count_participations(tx, "t", "data-1", "run_a", [b"a"]))
    with pytest.raises(InvalidRequestError, match="without keeping how"):
        b.reserve(1, unit_macs=[b"b"], max_participation=9)
    assert b.charges() == 0

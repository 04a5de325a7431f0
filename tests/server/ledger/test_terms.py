"""Entries that set and change a budget: once before any run, only upwards, never touching what was spent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.server.ledger.conftest import Book
from tg_tinker.errors import InvalidRequestError, ResourceNotFoundError, ServerError
from tg_tinker.ledger import LEDGER_DOMAIN, START, ChainEntry
from tg_tinker.ledger import PrivacyLedger as ClientLedger
from tg_tinker.ledger.history import read_history
from tg_tinker_server.dp.accounting import pld_delta
from tg_tinker_server.dp.events import Gaussian, ParticipationGaussian, SampledGaussian
from tg_tinker_server.ledger.fold import Fold
from tg_tinker_server.ledger.pricing import filter_delta
from tg_tinker_server.ledger.privacy_ledger import PrivacyLedger
from tg_tinker_server.store.ledger_rows import LedgerRow

Books = Callable[..., Book]
DRAWN = SampledGaussian(noise_multiplier=1.0, sample_rate=0.1, vouched_by="server")


def raise_to(book: Book, target: float, request: str = "r1", **more: str) -> None:
    asked = {"reason": "decided", "actor": "key_2", **more}
    book.ledger.raise_target(book.scope, target_epsilon=target, request_id=request, **asked)


def kinds(book: Book) -> list[str]:
    return [e.kind for e in book.ledger.entries(book.scope)]


def as_client(book: Book) -> ClientLedger:
    return ClientLedger.from_file_lines(e.to_json() for e in book.ledger.entries(book.scope))


def test_registering_sets_the_terms_before_any_run(book: Books) -> None:
    b = book(event=DRAWN).register(slots=100)
    assert (b.ledger.spent(b.scope).target_epsilon, b.epsilon()) == (8.0, 0.0)
    with pytest.raises(InvalidRequestError, match="use its terms"):
        b.open(target_epsilon=9.0)
    b.open()
    b.settle(b.reserve(1))
    assert kinds(b) == ["register", "open", "charge", "settle"]
    as_client(b).verify()


@pytest.mark.parametrize("before", ["register", "open"])
def test_a_name_with_a_ledger_is_never_registered_again(book: Books, before: str) -> None:
    b = book(event=replace(DRAWN, vouched_by="client"))
    b.register() if before == "register" else b.open()
    with pytest.raises(InvalidRequestError, match="has a ledger already"):
        b.register()
    assert kinds(b) == [before]


@pytest.mark.parametrize(("slots", "delta"), [(10, 0.1), (0, 1e-5), (10, 1.0)])
def test_a_delta_that_allows_publishing_a_unit_is_refused(book: Books, slots: int, delta: float) -> None:
    with pytest.raises(InvalidRequestError, match="publishing a whole unit"):
        book(delta=delta).register(slots)


def test_a_clients_draw_is_not_believed_on_a_registered_dataset_nor_ours_on_another(book: Books) -> None:
    b = book(event=DRAWN).register().open()
    claimed = replace(DRAWN, vouched_by="client")
    with pytest.raises(InvalidRequestError, match="sampling='none'"):
        b.open("run_b", mechanism=claimed)
    with pytest.raises(InvalidRequestError, match="sampling='none'"):
        b.reserve(1, event=claimed)
    b.reserve(1, event=Gaussian(noise_multiplier=2.0))  # batches that the client chose claim nothing
    other = book(event=claimed, scope=replace(b.scope, dataset_id="data-2")).open()
    with pytest.raises(ValueError, match="only registered datasets"):
        other.reserve(1, event=DRAWN)
    assert other.charges() == 0


def test_a_raise_lets_runs_go_on_and_gives_nothing_back(book: Books) -> None:
    b = book(target=3.0).open()
    seq = 1
    while b.ledger.refusal(b.scope, run_id="run_a", event=b.event, accountant="rdp") is None:
        b.reserve(seq)
        seq += 1
    spent = b.epsilon()
    raise_to(b, 4.0)
    assert b.epsilon() == spent
    assert spent < b.reserve(seq).epsilon_after <= 4.0
    with pytest.raises(InvalidRequestError, match="use its terms"):
        b.open("run_b")  # still asks for 3
    b.target = 4.0
    b.open("run_b")
    as_client(b).verify()
    assert as_client(b).target_epsilon == 4.0


def test_a_raise_that_is_repeated_is_one_raise(book: Books) -> None:
    b = book(target=3.0).open()
    for _ in range(2):
        raise_to(b, 4.0)
    assert kinds(b) == ["open", "raise"]
    with pytest.raises(InvalidRequestError, match="can only be raised"):
        raise_to(b, 4.0, "r2")


@pytest.mark.parametrize("target", [3.0, 2.0, -1.0, float("inf"), float("nan")])
def test_a_target_is_only_ever_raised(book: Books, target: float) -> None:
    b = book(target=3.0).open()
    with pytest.raises(InvalidRequestError, match="can only be raised"):
        raise_to(b, target)
    assert kinds(b) == ["open"]


@pytest.mark.parametrize("reason", ["", "  ", "two\nlines", "x" * 201])
def test_a_raise_has_a_reason_of_one_line(book: Books, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match="reason must be one line"):
        raise_to(book(target=3.0).open(), 4.0, reason=reason)


def test_there_is_nothing_to_raise_without_a_target_or_a_dataset(book: Books) -> None:
    with pytest.raises(ResourceNotFoundError):
        raise_to(book(), 4.0)
    with pytest.raises(InvalidRequestError, match="no target to raise"):
        raise_to(book(target=None).open(), 4.0)


def test_a_raise_leaves_a_begun_plan_its_share_of_delta(book: Books) -> None:
    """At the raised target the plan could use less delta; giving it back would lower what was spent."""
    event = SampledGaussian(noise_multiplier=1.0, sample_rate=0.1, vouched_by="client")
    b = book(event=event, accountant="prv", target=5.0).open(planned_steps=20)
    b.settle(b.reserve(1))
    b.open("run_b", accountant="rdp")
    b.settle(b.reserve(1, "run_b", accountant="rdp"))  # now the plan does not stand alone
    before = b.epsilon()
    raise_to(b, 8.0)
    assert b.epsilon() == before
    assert PrivacyLedger(b.db, clock=b.ledger._clock).spent(b.scope).epsilon == before  # also read anew
    fold, terms = b.db.read(lambda tx: b.ledger._opened(tx, b.scope))
    assert filter_delta(fold, terms) == pytest.approx(b.delta - pld_delta(1.0, 0.1, 20, 5.0), rel=1e-12)
    assert pld_delta(1.0, 0.1, 20, 8.0) < pld_delta(1.0, 0.1, 20, 5.0)


def test_the_first_run_of_a_registered_dataset_may_have_a_plan(book: Books) -> None:
    b = book(event=DRAWN, accountant="prv").register().open(planned_steps=20)
    assert b.reserve(1).accountant == "prv"
    b.open("run_b", planned_steps=20)
    assert b.reserve(1, "run_b").accountant == "rdp"


def test_an_erasure_is_noted_and_changes_no_price(book: Books) -> None:
    b = book(event=DRAWN).register().open()
    b.reserve(1)
    before = b.epsilon()
    b.db.write(lambda tx: b.ledger.note_erasure(tx, b.scope, records=3, actor="key_1"))
    assert b.epsilon() == before
    assert b.ledger.entries(b.scope)[-1].body["records"] == 3
    as_client(b).verify()


def forged(entries: list[ChainEntry], at: int, **changed: Any) -> list[ChainEntry]:
    """The same history with one entry changed and every hash made anew, as a server that lies would do."""
    made: list[ChainEntry] = []
    for position, entry in enumerate(entries):
        body = {**entry.body, **(changed if position == at else {})}
        head = made[-1].entry_hash if made else START
        made.append(ChainEntry.make(LEDGER_DOMAIN, body, position=position, prev_hash=head))
    return made


@pytest.mark.parametrize(
    ("at", "changed", "why"),
    [
        (0, {"kind": "open", "mechanism": {}}, "unknown fields"),
        (0, {"slots": 0}, "without units"),
        (1, {"target_epsilon": "9.0"}, "changes the budget"),
        (2, {"target_epsilon": "7.0"}, "no raise"),
        (2, {"target_epsilon": "inf"}, "no decimal string"),
        (2, {"kind": "register", "slots": 5}, "unknown fields"),
        (3, {"epsilon_after": "11.0"}, "over the 10"),
        (3, {"event": 1}, "event is no object"),
        (5, {"records": -1}, "records is no count"),
        (5, {"kind": "forget"}, "does not know"),
        (5, {"kind": "verify"}, "does not know"),
    ],
)
def test_the_client_finds_every_lie_about_the_terms(book: Books, at: int, changed: dict[str, Any], why: str) -> None:
    b = book(event=DRAWN).register().open()
    raise_to(b, 10.0)
    b.settle(b.reserve(1))
    b.db.write(lambda tx: b.ledger.note_erasure(tx, b.scope, records=3, actor="key_1"))
    entries = b.ledger.entries(b.scope)
    assert [e.kind for e in entries] == ["register", "open", "raise", "charge", "settle", "erase"]
    whole = as_client(b)
    whole.verify()
    with pytest.raises(InvalidRequestError, match=why) as e:
        replace(whole, entries=tuple(forged(entries, at, **changed))).verify()
    assert e.value.details["position"] == at


def as_rows(entries: list[ChainEntry], dataset_id: str = "data-1") -> list[LedgerRow]:
    return [
        LedgerRow(
            tenant="t",
            dataset_id=dataset_id,
            position=e.position,
            kind=e.kind,
            run_id=e.body["run_id"],
            seq=e.body.get("seq", 0),
            attempt=e.body.get("attempt", 0),
            body_json=e.body_json(),
            prev_hash=e.prev_hash,
            entry_hash=e.entry_hash,
            leaf_index=e.position,
        )
        for e in entries
    ]


def test_the_server_goes_on_from_no_price_that_it_cannot_have_charged(book: Books) -> None:
    counted = ParticipationGaussian(noise_multiplier=2.0, releases=1)
    b = book(event=counted).open()
    for seq in (1, 2):
        b.reserve(seq, unit_macs=[b"%d" % seq], max_participation=2)
    entries = b.ledger.entries(b.scope)
    assert Fold().extended(as_rows(entries)).run("run_a").releases == 1
    event = {"kind": "participation_gaussian", "noise_multiplier": "2.0", "releases": 1}
    drawn = {"kind": "sampled_gaussian", "noise_multiplier": "2.0", "sample_rate": "0.1", "vouched_by": "server"}
    for at, false in (
        (1, {**event, "releases": 0}),
        (1, {**event, "releases": 2}),
        (2, {**event, "noise_multiplier": "0.1"}),
        (2, drawn),
    ):
        changed = forged(entries, at, event=false)
        with pytest.raises(ServerError, match=f"cannot be trusted at position {at}"):
            Fold().extended(as_rows(changed))
        with pytest.raises(InvalidRequestError, match=f"wrong at position {at}"):
            read_history("data-1", (e.body for e in changed))
    registered = book(event=DRAWN, scope=replace(b.scope, dataset_id="data-2")).open()
    registered.reserve(1)
    changed = forged(registered.ledger.entries(registered.scope), 2, event={**drawn, "vouched_by": "client"})
    with pytest.raises(ServerError, match="cannot be trusted at position 2"):
        Fold().extended(as_rows(changed, "data-2"))
    with pytest.raises(InvalidRequestError, match="from which the server draws"):
        read_history("data-2", (e.body for e in changed))


@pytest.mark.parametrize(
    ("at", "changed"),
    [
        (0, {"kind": "open", "mechanism": {"kind": "gaussian", "noise_multiplier": "1.0"}}),
        (0, {"slots": 0}),
        (0, {"slots": "many"}),
        (0, {"target_delta": "1.5"}),
        (1, {"target_epsilon": "9.0"}),
        (2, {"target_epsilon": "7.0"}),
        (2, {"target_epsilon": "inf"}),
        (2, {"kind": "register", "slots": 5, "target_epsilon": "9.0", "target_delta": "1e-05", "unit": "datum"}),
        (5, {"records": -1}),
        (5, {"kind": "forget"}),
    ],
)
def test_the_server_releases_nothing_on_terms_it_cannot_have_written(
    book: Books, at: int, changed: dict[str, Any]
) -> None:
    b = book(event=DRAWN).register().open()
    raise_to(b, 10.0)
    b.settle(b.reserve(1))
    b.db.write(lambda tx: b.ledger.note_erasure(tx, b.scope, records=3, actor="key_1"))
    entries = b.ledger.entries(b.scope)
    assert Fold().extended(as_rows(entries)).slots == 1000
    with pytest.raises(ServerError, match="cannot be trusted at position") as e:
        Fold().extended(as_rows(forged(entries, at, **changed)))
    assert e.value.details["position"] == (3 if at == 0 and "kind" in changed else at)

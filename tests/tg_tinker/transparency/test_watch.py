"""A server's history is held to what it showed before: rolled back, forked, exchanged, or simply longer."""

from __future__ import annotations

import threading
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.tg_tinker.transparency.logs import Log, entry, log_of
from tg_tinker.errors import LogVerificationError
from tg_tinker.transparency.folder import Folder
from tg_tinker.transparency.note import Checkpoint, VerifierKey, sign_note
from tg_tinker.transparency.pins import Pins
from tg_tinker.transparency.receipts import Receipts
from tg_tinker.transparency.watch import Watch

DAY = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)


def watch(
    folder: Path, *, address: str = "host:1", loopback: bool = False, tenant: str = "acme", save_s: float = 0.0
) -> Watch:
    """As a new process would make one."""
    return Watch(
        Pins(Folder(folder)),
        address=address,
        tenant=tenant,
        loopback=loopback,
        receipts=Receipts(Folder(folder)),
        now=lambda: DAY,
        save_s=save_s,
    )


def seen(folder: Path, log: Log) -> Watch:
    """A watch that has verified the log as it is."""
    w = watch(folder)
    assert w.advance(*log.answer(w.known_size))
    return w


def kind(wanted: str, match: str = "") -> pytest.RaisesExc[LogVerificationError]:
    return pytest.RaisesExc(
        LogVerificationError, match=match or ".", check=lambda e: e.kind == wanted == e.details["kind"]
    )


def test_a_log_that_grows_is_followed_and_pinned(tmp_path: Path) -> None:
    log, w = log_of(0), watch(tmp_path)
    assert (w.known_size, w.checkpoint, w.verifier_key) == (0, None, None)
    for size in (0, 3, 3, 8, 21):
        while log.size < size:
            log.append(entry(log.size))
        assert w.advance(*log.answer(w.known_size))
        assert w.known_size == size
    later = watch(tmp_path)
    assert later.known_size == 21
    assert later.checkpoint == Checkpoint.open(log.note(), log.key) == w.checkpoint
    assert later.verifier_key == log.key
    log.append(entry(21))
    assert later.advance(*log.answer(21))


@pytest.mark.parametrize("restarted", [False, True])
def test_a_log_that_was_rolled_back_is_refused_and_says_so(tmp_path: Path, restarted: bool) -> None:
    w = seen(tmp_path, log_of(25))
    if restarted:
        w = watch(tmp_path)
    with kind("rolled_back", "shows 10 entries, we saw 25 on 2026-03-01 12:30 UTC") as caught:
        w.advance(*log_of(10).answer(w.known_size))
    assert caught.value.details["shown_size"] == 10
    assert caught.value.details["seen_size"] == 25
    assert caught.value.details["checkpoint"] == log_of(10).note()
    assert watch(tmp_path).known_size == 25  # the pin stays


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("at", range(0, 25, 6))
@pytest.mark.parametrize("size", [25, 26, 40])
def test_a_log_whose_past_was_changed_is_refused(tmp_path: Path, at: int, size: int, restarted: bool) -> None:
    w = seen(tmp_path, log_of(25))
    if restarted:
        w = watch(tmp_path)
    forked = Log([entry(i) if i != at else entry(1000 + i) for i in range(size)])
    with kind("forked", "2026-03-01 12:30 UTC"):
        w.advance(*forked.answer(w.known_size))


def test_a_log_restored_and_grown_past_what_was_seen_is_refused(tmp_path: Path) -> None:
    seen(tmp_path, log_of(25))
    restored = log_of(10)
    for i in range(100, 120):
        restored.append(entry(i))
    w = watch(tmp_path)
    with kind("forked", "the 30 entries it shows do not continue the 25"):
        w.advance(*restored.answer(w.known_size))


def test_a_hundred_restored_databases_are_refused_a_hundred_times(tmp_path: Path) -> None:
    refused = 0
    for i in range(100):
        folder = tmp_path / str(i)
        seen(folder, log_of(100))
        restored = log_of(i)
        if i % 2:
            for j in range(100 - i + i % 7):
                restored.append(entry(500 + j))
        w = watch(folder)
        with pytest.raises(LogVerificationError) as caught:
            w.advance(*restored.answer(w.known_size))
        refused += caught.value.kind == ("forked" if i % 2 else "rolled_back")
    assert refused == 100


def test_the_first_error_is_final(tmp_path: Path) -> None:
    honest, w = log_of(25), seen(tmp_path, log_of(25))
    with kind("rolled_back"):
        w.advance(*log_of(3).answer(25))
    for call in (
        lambda: w.known_size,
        lambda: w.checkpoint,
        lambda: w.advance(*honest.answer(25)),
        lambda: w.check_receipt(honest.receipt(3)),
    ):
        with kind("rolled_back", "shows 3 entries, we saw 25"):
            call()
    assert watch(tmp_path).advance(*honest.answer(25))  # a new process may find the server put right


def test_a_proof_that_does_not_prove_is_refused(tmp_path: Path) -> None:
    log = log_of(25)
    w = seen(tmp_path, log)
    log.append(entry(25))
    note, key, size, proof = log.answer(25)
    with kind("forked"):
        w.advance(note, key, size, proof[:-1])


def test_another_log_at_an_address_is_refused_and_the_message_says_how_to_go_on(tmp_path: Path) -> None:
    seen(tmp_path, log_of(5))
    w, other = watch(tmp_path), log_of(30, seed=2)
    with kind("identity_changed", "tg-tinker log forget host:1") as caught:
        w.advance(*other.answer(w.known_size))
    assert caught.value.details["known_origin"] == log_of(0).key.name
    assert watch(tmp_path, tenant="else").advance(*other.answer(0))  # another tenant has another log
    assert watch(tmp_path, address="host:2").advance(*log_of(9, seed=3).answer(0))


def test_on_this_machine_another_log_may_answer_but_none_may_be_rolled_back(tmp_path: Path) -> None:
    old = watch(tmp_path, address="localhost:1", loopback=True)
    assert old.advance(*log_of(25).answer(0))
    new = watch(tmp_path, address="localhost:1", loopback=True)
    other = log_of(3, seed=2)
    assert not new.advance(*other.answer(new.known_size))  # asked from 25 of a log that is gone
    assert new.known_size == 0
    assert new.advance(*other.answer(0))
    elsewhere = watch(tmp_path, address="localhost:2", loopback=True)
    assert not elsewhere.advance(*log_of(30).answer(0))  # a log we know, at a new port: its pin counts
    assert elsewhere.known_size == 25
    with kind("rolled_back"):
        elsewhere.advance(*log_of(24).answer(25))


def test_what_the_log_did_not_sign_is_refused(tmp_path: Path) -> None:
    log, other = log_of(5), log_of(5, seed=2)
    forged = sign_note(Checkpoint(log.key.name, 9, bytes(32)).body(), log.key, other.private.sign)
    foreign = VerifierKey(log.key.name, other.key.public_key)  # their key under our log's name
    false = sign_note(Checkpoint.open(log.note(), log.key).body(), foreign, other.private.sign)
    for note, key in (
        (forged, log.key.text),
        (log.note(), other.key.text),
        (log.note()[:-3], log.key.text),
        (false, foreign.text),
        (log.note(), "no key"),
    ):
        w = watch(tmp_path)
        with kind("bad_signature", "the server at host:1 cannot be trusted for tenant acme"):
            w.advance(note, key, 0, [])
    assert watch(tmp_path).known_size == 0
    assert Pins(Folder(tmp_path)).servers() == []


def test_an_answer_that_was_overtaken_is_no_rollback(tmp_path: Path) -> None:
    log, w = log_of(5), watch(tmp_path)
    assert w.advance(*log.answer(0))
    log.append(entry(5))
    late = log.answer(5)
    receipt = log.receipt(5)
    log.append(entry(6))
    assert w.advance(*log.answer(5))
    assert w.advance(*late)
    w.check_receipt(receipt)
    assert w.known_size == 7


def test_an_overtaken_answer_with_another_root_is_a_fork(tmp_path: Path) -> None:
    log, w = log_of(5), seen(tmp_path, log_of(5))
    forked = log_of(5)
    log.append(entry(5))
    forked.append(entry(50))
    assert w.advance(*log.answer(5))
    with kind("forked", "at 6 entries it shows another root"):
        w.advance(*forked.answer(5))


def test_after_the_first_checkpoint_an_answer_from_nothing_counts_for_nothing(tmp_path: Path) -> None:
    w = seen(tmp_path, log_of(5))
    assert not w.advance(*Log([entry(9)] * 8).answer(0))  # anything continues the empty log
    assert w.known_size == 5


def test_two_processes_that_were_shown_different_logs_find_out(tmp_path: Path) -> None:
    seen(tmp_path, log_of(5))
    a, b = watch(tmp_path), watch(tmp_path)
    one, two = log_of(5), log_of(5)
    one.append(entry(5))
    two.append(entry(50))
    assert a.advance(*one.answer(5))
    with kind("forked", "by another process"):
        b.advance(*two.answer(5))


def test_a_receipt_is_checked_against_what_was_verified_and_kept(tmp_path: Path) -> None:
    log = log_of(25)
    w = seen(tmp_path, log)
    w.check_receipt(log.receipt(7))
    assert Receipts(Folder(tmp_path)).read_all(log.key.name, "data-1") == [log.receipt(7)]


@pytest.mark.parametrize(
    ("spoil", "wanted"),
    [
        (lambda r: replace(r, entry=entry(8)), "bad_proof"),
        (lambda r: replace(r, leaf_index=8), "bad_proof"),
        (lambda r: replace(r, proof=r.proof[:-1]), "bad_proof"),
        (lambda r: replace(r, checkpoint=log_of(25, seed=2).note()), "bad_signature"),
        (lambda r: log_of(25, seed=2).receipt(7), "bad_signature"),
        (lambda r: log_of(26).receipt(7), "bad_proof"),  # true, but not shown to continue ours
        (lambda r: Log([entry(i) if i else entry(99) for i in range(25)]).receipt(7), "forked"),
    ],
)
def test_a_false_receipt_is_refused_for_good_and_not_kept(tmp_path: Path, spoil, wanted: str) -> None:
    log = log_of(25)
    w = seen(tmp_path, log)
    with kind(wanted, "the server at host:1"):
        w.check_receipt(spoil(log.receipt(7)))
    with kind(wanted):
        _ = w.known_size
    assert Receipts(Folder(tmp_path)).files() == []


def test_many_threads_follow_one_log(tmp_path: Path) -> None:
    log, w, wrong = log_of(1), watch(tmp_path), []
    adding = threading.Lock()
    assert w.advance(*log.answer(0))

    def follow() -> None:
        try:
            for _ in range(20):
                known = w.known_size
                with adding:
                    log.append(entry(log.size))
                    answer, receipt = log.answer(known), log.receipt(log.size - 1)
                assert w.advance(*answer)
                w.check_receipt(receipt)
        except BaseException as e:
            wrong.append(e)

    threads = [threading.Thread(target=follow) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []
    assert w.known_size == log.size == 81
    assert watch(tmp_path).known_size == 81
    assert len(Receipts(Folder(tmp_path)).read_all(log.key.name, "data-1")) == 80


def test_pins_are_written_now_and_then_and_when_asked(tmp_path: Path) -> None:
    log = log_of(3)
    w = watch(tmp_path, save_s=3600.0)
    assert w.advance(*log.answer(w.known_size))
    assert watch(tmp_path).known_size == 3  # the first at once
    log.append(entry(3))
    assert w.advance(*log.answer(w.known_size))
    assert w.known_size == 4
    assert watch(tmp_path).known_size == 3
    w.save()
    assert watch(tmp_path).known_size == 4


def test_a_pin_that_waited_is_held_to_what_another_process_saw(tmp_path: Path) -> None:
    mine, other = log_of(3), log_of(3)
    w = watch(tmp_path, save_s=3600.0)
    assert w.advance(*mine.answer(w.known_size))
    elsewhere = watch(tmp_path)
    mine.append(entry(3))
    other.append(entry(99))
    for at, log in ((w, mine), (elsewhere, other)):
        assert at.advance(*log.answer(at.known_size))
    with kind("forked"):
        w.save()
    with kind("forked"):
        _ = w.known_size

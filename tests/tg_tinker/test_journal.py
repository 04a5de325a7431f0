from hypothesis import given
from hypothesis import strategies as st

from tg_tinker.journal import Entry, Journal
from tg_tinker.wire.calls import Position


class Nobody:
    def ending(self, operation, outcome):
        pass


def entry(seq, *, effect=True):
    made = Entry(None, Nobody(), Position(run_id="r", seq=seq), "forward_backward", known=False)
    made.request = (None, b"bytes")
    made.effect = effect
    return made


def journal_with(*entries):
    journal = Journal(next_seq=1)
    for e in entries:
        journal.add(e)
    return journal


def test_entries_are_numbered_and_queued_in_order():
    one, two = entry(1), entry(2)
    journal = journal_with(one, two)
    assert journal.next_seq == 3
    assert list(journal.queue) == [one, two]
    journal.accepted(one, "a")
    assert list(journal.queue) == [two]


def test_what_is_durable_is_let_go():
    entries = [entry(n) for n in (1, 2, 3)]
    journal = journal_with(*entries)
    assert journal.forget(2) == entries[:2]
    assert [e.request for e in entries] == [None, None, (None, b"bytes")]
    assert list(journal.queue) == [entries[2]]
    assert journal.forget(1) == []
    assert journal.durable_seq == 2


def test_of_a_finished_entry_only_its_number_is_kept():
    evaluation = entry(1, effect=False)
    journal = journal_with(evaluation, entry(2))
    journal.accepted(evaluation, "a")
    evaluation.end("completed", 1.0)
    journal.finish(evaluation)
    assert evaluation.request is None
    assert journal.finished_seqs() == [1]
    journal.forget(1)
    assert journal.finished_seqs() == []


def test_an_ended_entry_with_an_effect_is_sent_again_after_a_restart():
    trained, evaluated, waiting = entry(1), entry(2, effect=False), entry(3)
    journal = journal_with(trained, evaluated, waiting)
    for e in (trained, evaluated, waiting):
        journal.accepted(e, "a")
    trained.end("completed", 1.0)
    evaluated.end("completed", 1.0)
    assert journal.restart("b", 1) == []
    assert list(journal.queue) == [trained, waiting]
    assert journal.finished_seqs() == [2]


def test_a_restarted_server_is_not_sent_what_it_has():
    entries = [entry(n) for n in (1, 2, 3)]
    journal = journal_with(*entries)
    journal.accepted(entries[0], "a")
    journal.accepted(entries[1], "a")
    journal.accepted(entries[2], "b")
    assert journal.restart("b", 2) == [entries[0], entries[2]]
    assert list(journal.queue) == [entries[1]]
    assert journal.replaying()


def test_rolling_back_frees_the_numbers_for_others():
    entries = [entry(n) for n in (1, 2, 3)]
    journal = journal_with(*entries)
    journal.accepted(entries[0], "a")
    assert journal.roll_back(entries[1]) == entries[1:]
    assert journal.next_seq == 2
    again = entry(2, effect=False)
    journal.add(again)
    entries[1].end("failed", ValueError())
    journal.finish(entries[1])
    assert list(journal.queue) == [again]
    assert journal.finished_seqs() == []


def test_numbers_nobody_can_give_are_passed_over_once():
    journal = Journal(next_seq=8)
    assert journal.pass_over(range(5, 8))
    assert not journal.pass_over(range(6, 8))
    assert journal.finished_seqs() == [5, 6, 7]
    assert not journal.pass_over(range(9, 8))


@given(st.lists(st.booleans(), max_size=12), st.data())
def test_after_any_restart_every_number_is_finished_known_or_queued(effects, data):
    entries = [entry(i + 1, effect=e) for i, e in enumerate(effects)]
    journal = journal_with(*entries)
    sent = data.draw(st.integers(0, len(entries)))
    for e in entries[:sent]:
        journal.accepted(e, "a")
    for e in data.draw(st.sets(st.sampled_from(entries[:sent]))) if sent else ():
        e.end("completed", 1.0)
        if e.finished:
            journal.finish(e)
    durable = data.draw(st.integers(0, sent))
    journal.forget(durable)
    finished = set(journal.finished_seqs())
    expected = durable + 1
    while expected in finished:
        expected += 1
    journal.restart("b", expected)
    queued = [e.seq for e in journal.queue]
    assert queued == sorted(queued)
    assert {*queued, *finished, *range(1, expected)} == set(range(1, len(entries) + 1)) | set(range(1, expected))
    assert not finished & set(queued)

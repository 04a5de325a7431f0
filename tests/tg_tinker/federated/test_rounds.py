"""The course of a job: whatever happens in whatever order, it moves on by releases alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tg_tinker.errors import FederationRefusedError, InvalidRequestError
from tg_tinker.federated.rounds import FOR_GOOD, Answer, Course

SITES = ("a", "b", "c", "d")
UPDATE = Answer(kind="update")
OUT = {"artifact_id": "ckpt", "weights_digest": "00"}


def course(**settings):
    return Course(**{"rounds": 2, "roster": SITES, "quorum": 2, "min_updates": 2, **settings})


def training(members=SITES, **settings):
    joined = course(**settings)
    for site in members:
        joined = joined.accepted(site)
    return joined.begin()


def answered(at, **answers):
    for site, answer in answers.items():
        at = at.answer(site, answer, round=at.round, attempt=at.attempt)
    return at


def test_a_job_goes_from_joining_over_its_rounds_to_finished():
    at = training()
    for number in (1, 2):
        assert (at.phase, at.round) == ("training", number)
        at = answered(at.ask(SITES), a=UPDATE, b=UPDATE, c=UPDATE, d=UPDATE).close()
        at = at.release(**OUT).evaluated({"loss": 1.0})
    assert at.phase == "finished"
    assert at.over
    assert [(r.round, r.attempts, r.updates, r.metrics) for r in at.released] == [
        (1, 1, 4, {"loss": 1.0}),
        (2, 1, 4, {"loss": 1.0}),
    ]


def test_a_job_that_too_few_join_fails_and_says_who_said_what():
    at = course().accepted("a").leaves("b", Answer.refused("policy", "epsilon 9 is over 3")).begin()
    assert at.phase == "failed"
    assert "1 of 4 sites joined, 2 are needed" in at.why
    assert "b: refused (policy) epsilon 9 is over 3" in at.why
    assert "c: no_answer did not answer" in at.why
    assert "a:" not in at.why


def test_a_round_goes_on_without_a_bad_update_and_a_dead_site_if_enough_are_left():
    at = answered(
        training().ask(SITES),
        a=UPDATE,
        b=Answer.bad(FederationRefusedError("'x' is not finite", reason="bad_update")),
        d=UPDATE,
    ).close()
    assert at.releasable
    record = at.release(**OUT).released[0]
    assert {s: (a.kind, a.reason) for s, a in record.answers.items()} == {
        "a": ("update", ""),
        "b": ("bad_update", "bad_update"),
        "c": ("no_answer", ""),
        "d": ("update", ""),
    }
    assert record.updates == 2


def test_an_attempt_with_too_few_updates_is_repeated_with_those_that_are_missing_only():
    at = answered(training(max_attempts=2).ask(SITES), a=UPDATE).close()
    assert not at.releasable
    again = at.ask(SITES)
    assert (again.attempt, again.asked) == (2, ("b", "c", "d"))
    assert answered(again, c=UPDATE).close().releasable
    failed = again.close()
    assert failed.phase == "failed"
    assert "round 1 has 1 updates and needs 2, after 2 attempts" in failed.why


def test_a_masked_round_starts_over():
    at = answered(training().ask(SITES), a=UPDATE).close().ask(SITES, again=True)
    assert at.asked == SITES
    assert at.with_update == ()


def test_a_masked_sum_that_was_opened_and_lost_is_skipped_and_three_in_a_row_fail_the_job():
    at = training(rounds=9)
    with pytest.raises(InvalidRequestError):
        at.ask(SITES).skip("lost", **OUT)
    for number in (1, 2, 3):
        at = answered(at.ask(SITES), a=UPDATE, b=UPDATE, c=UPDATE).close().open("abc")
        assert at.resumed().opened == ("a", "b", "c")
        at = at.skip("lost", **OUT)
        assert (at.round, at.opened, at.released[-1].skipped) == (number + 1, ("a", "b", "c"), "lost")
        assert at.released[-1].updates == 0
    at = at.ask(SITES).close("sums differ").open("abc")
    for _ in range(5):
        at = at.ask(SITES).close()
    assert at.phase == "training"
    assert "3 rounds in a row" in at.skip("lost", **OUT).why


def test_a_site_that_refuses_for_good_is_not_asked_again():
    at = answered(training().ask(SITES), a=UPDATE, b=UPDATE, c=Answer.refused("expired", "x"))
    assert at.members == ("a", "b", "d")
    assert at.left["c"].reason == "expired"
    with pytest.raises(InvalidRequestError):
        at.close().release(**OUT).ask(SITES)
    stays = answered(training().ask(SITES), c=Answer.refused("wrong_round", "x"))
    assert stays.members == SITES


def test_late_repeated_and_foreign_replies_are_counted_and_change_nothing():
    at = answered(training().ask(SITES), a=UPDATE)
    late = at.answer("b", UPDATE, round=1, attempt=0)
    twice = late.answer("a", Answer.refused("policy", "no"), round=1, attempt=1)
    early = twice.answer("c", UPDATE, round=2, attempt=1)
    assert early.ignored == 3
    assert early == at.model_copy(update={"ignored": 3})


def test_a_site_that_was_away_may_join_between_rounds_and_one_that_left_may_not():
    at = training(("a", "b")).leaves("c", Answer.refused("policy", ""))
    assert at.unheard == ("d",)
    assert at.accepted("d").members == ("a", "b", "d")
    assert at.accepted("c").members == ("a", "b")


def test_a_restart_asks_again_under_a_new_attempt_and_forgets_updates_of_the_old_one():
    at = answered(training().ask(SITES), a=UPDATE, b=UPDATE)
    again = at.resumed()
    assert (again.phase, again.attempt, again.tries, again.answers) == ("training", 1, 0, {})
    assert again.ask(SITES).attempt == 2
    unasked = training(min_updates=0).ask(SITES).close().resumed()
    assert not unasked.releasable
    failed = at.fail("budget")
    assert (failed.resumed().phase, failed.resumed().why) == ("training", "")
    assert course().resumed().phase == "joining"
    assert course().begin().resumed().phase == "joining"
    assert training().resumed().phase == "training"


def test_who_took_part_is_not_kept_where_that_would_tell_who_was_drawn():
    record = training(public=False, min_updates=0).ask(("a",)).close().release(**OUT).released[0]
    assert record.answers is None
    assert record.updates is None


def test_text_of_a_site_is_cut_and_cleaned():
    said = Answer.refused("policy\x1b[2J" * 50, "x\n\x00" * 1000)
    assert said.reason.isprintable()
    assert said.message.isprintable()
    assert len(said.reason) <= 40
    assert len(said.message) <= 300


def test_a_site_outside_the_roster_cannot_join():
    with pytest.raises(FederationRefusedError) as e:
        course().accepted("mallory")
    assert e.value.reason == "unknown_site"


ANSWERS = st.sampled_from(
    [
        UPDATE,
        Answer.none("x"),
        Answer.refused("policy", ""),
        Answer.refused("wrong_round", ""),
        Answer(kind="bad_update"),
    ]
)
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("accepted"), st.sampled_from(SITES)),
        st.tuples(st.just("leaves"), st.sampled_from(SITES)),
        st.tuples(st.sampled_from(["begin", "close", "release", "resumed", "fail", "open", "skip"])),
        st.tuples(st.just("ask"), st.sets(st.sampled_from(SITES)), st.booleans()),
        st.tuples(st.just("answer"), st.sampled_from(SITES), ANSWERS, st.integers(0, 1), st.integers(0, 1)),
    ),
    max_size=60,
)


def _do(at, event):
    match event:
        case ("leaves", site):
            return at.leaves(site, Answer.refused("policy", ""))
        case ("answer", site, answer, rounds_back, attempts_back):
            return at.answer(site, answer, round=at.round - rounds_back, attempt=at.attempt - attempts_back)
        case ("ask", sites, again):
            return at.ask(sites & set(at.members), again=again)
        case ("release",):
            return at.release(**OUT)
        case ("skip",):
            return at.skip("lost", **OUT)
        case ("open",):
            return at.open(at.with_update)
        case ("fail",):
            return at.fail("because")
        case (name, *arguments):
            return getattr(at, name)(*arguments)


@settings(max_examples=150)
@given(EVENTS, st.integers(0, 3))
def test_whatever_happens_a_course_stays_possible_and_moves_by_releases_alone(events, min_updates):
    at = course(min_updates=min_updates)
    for site in SITES:
        at = at.accepted(site)
    used = set()
    for event in events:
        before = at
        try:
            at = _do(at, event)
        except InvalidRequestError:
            assert at == before
            continue
        assert Course.model_validate_json(at.model_dump_json()) == at
        grown = len(at.released) - len(before.released)
        assert at.released[: len(before.released)] == before.released
        assert grown == (event[0] == "release" or (event[0] == "skip" and at.phase != "failed"))
        if event[0] == "skip":
            assert before.opened
        elif grown:
            assert len(before.with_update) >= min_updates
            assert not before.waiting_for
        if event[0] == "ask":
            assert (at.round, at.attempt) not in used
            used.add((at.round, at.attempt))
            assert not set(at.asked) & set(at.left)
        if event[0] == "answer" and event[3:] != (0, 0) and before.attempt:
            assert at.answers == before.answers
        if before.phase == "finished":
            assert at.phase == "finished"
        assert set(before.left) <= set(at.left)
        first_word = before.answers.items() if event[0] == "answer" else ()
        assert all(at.answers[site] == word for site, word in first_word)
        assert (at.phase == "failed") == bool(at.why)


@pytest.mark.parametrize(
    "impossible",
    [
        {"members": ("x",)},
        {"members": ("a",), "left": {"a": UPDATE}},
        {"phase": "finished"},
        {"phase": "failed"},
        {"why": "x"},
        {"quorum": 0},
    ],
)
def test_a_course_that_cannot_be_is_not_read_from_disk(impossible):
    with pytest.raises(ValidationError):
        course(**impossible)


def test_the_reasons_for_good_are_reasons_of_the_error():
    assert all(f'``"{reason}"``' in FederationRefusedError.__doc__ for reason in FOR_GOOD)

"""Patience with workers, told by a clock of the test."""

import pytest

from tg_tinker_server.engine.vllm.patience import ENDS_WITHIN_S, MOST_ENDS, STARTING_S, Patience


@pytest.fixture
def now():
    return [1000.0]


@pytest.fixture
def patience(now):
    return Patience(silent_s=50.0, clock=lambda: now[0])


def test_silence_begins_when_something_is_owed_and_ends_with_a_word(patience, now):
    assert not patience.is_over(ready=True)
    now[0] += 50
    assert not patience.is_over(ready=True)
    patience.heard()
    now[0] += 50
    assert not patience.is_over(ready=True)
    now[0] += 51
    assert patience.is_over(ready=True)


def test_a_start_may_take_longer(patience, now):
    assert not patience.is_over(ready=False)
    now[0] += STARTING_S
    assert not patience.is_over(ready=False)
    now[0] += 1
    assert patience.is_over(ready=False)


def test_three_ends_in_ten_minutes_are_too_many_and_later_forgotten(patience, now):
    for _ in range(MOST_ENDS):
        assert not patience.ends_too_often
        patience.ended()
        now[0] += 100
    assert patience.ends_too_often
    now[0] += ENDS_WITHIN_S - 100 * MOST_ENDS
    assert not patience.ends_too_often


def test_workers_that_hang_one_after_the_other_have_ended_too_often_however_long_it_took(patience, now):
    for _ in range(MOST_ENDS):
        assert not patience.ends_too_often
        patience.is_over(ready=True)
        now[0] += 10 * ENDS_WITHIN_S
        assert patience.is_over(ready=True)
        patience.ended()
    assert patience.ends_too_often
    now[0] += ENDS_WITHIN_S
    assert not patience.ends_too_often

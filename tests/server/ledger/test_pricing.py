"""Prices: what an entry says is what the accountant it names says, and shares of delta never add up to more."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from tg_tinker.errors import DPBudgetExceededError
from tg_tinker_server.dp.accounting import add, cost, epsilon, pld_delta, pld_epsilon, prv_epsilon, repeated
from tg_tinker_server.dp.events import Gaussian, SampledGaussian
from tg_tinker_server.ledger.fold import Fold, Plan, Terms
from tg_tinker_server.ledger.pricing import Price, filter_delta, refuse_over

EVENT = SampledGaussian(noise_multiplier=1.0, sample_rate=0.1, vouched_by="client")
DELTA = 1e-5
Books = Callable[..., Any]


def test_a_plan_fixed_in_advance_is_priced_by_prv_and_stays_above_the_privacy_loss_distribution(book: Books) -> None:
    b = book(accountant="prv", target=4.0).open(planned_steps=6)
    total = 0.0
    for seq in range(1, 7):
        paid = b.reserve(seq)
        assert paid.accountant == "prv"
        assert paid.epsilon_after == prv_epsilon(1.0, 0.1, seq, DELTA)
        assert pld_epsilon([EVENT] * seq, DELTA) <= paid.epsilon_after < epsilon(repeated(cost(EVENT), seq), DELTA)
        total += paid.epsilon_after - paid.epsilon_before
        assert b.epsilon() == paid.epsilon_after
    assert b.epsilon() == pytest.approx(total, abs=1e-9)
    assert [e.body["accountant"] for e in b.ledger.entries(b.scope) if e.kind == "charge"] == ["prv"] * 6


def test_prv_lets_a_plan_take_steps_that_the_filter_would_refuse(book: Books) -> None:
    by_filter = book(target=2.6).open()
    steps = by_filter.ledger.forecast(
        by_filter.scope, run_id="run_a", event=EVENT, steps=1, accountant="rdp", releases_left=None
    ).steps_remaining
    planned = book(target=2.6, accountant="prv", scope=by_filter.scope.__class__("t", "data-2"))
    planned.open(planned_steps=steps + 1)
    for seq in range(1, steps + 2):
        assert planned.reserve(seq).accountant == "prv"


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        ("no plan", {}),
        ("another noise", {"event": SampledGaussian(noise_multiplier=1.1, sample_rate=0.1, vouched_by="client")}),
        ("another run", {"run": "run_b"}),
    ],
)
def test_what_was_not_planned_is_priced_by_the_filter(book: Books, change: str, settings: dict[str, Any]) -> None:
    b = book(accountant="prv").open(**({} if change == "no plan" else {"planned_steps": 10}))
    paid = b.reserve(1, **settings)
    assert paid.accountant == "rdp"
    assert paid.epsilon_after == epsilon(cost(paid.event), DELTA)
    assert b.reserve(2).accountant == "rdp"  # and nobody is alone on the dataset any more


def test_after_a_plan_was_begun_the_filter_has_only_the_delta_that_the_plan_leaves(book: Books) -> None:
    b = book(accountant="prv", target=8.0).open(planned_steps=10)
    planned = b.reserve(1)
    other = b.reserve(1, run="run_b")
    left = DELTA - pld_delta(1.0, 0.1, 10, 8.0)
    assert 0 < left < DELTA
    assert other.accountant == "rdp"
    assert other.epsilon_before == planned.epsilon_after
    assert other.epsilon_after == epsilon(repeated(cost(EVENT), 2), left) > epsilon(repeated(cost(EVENT), 2), DELTA)
    again = b.reserve(2)
    assert (again.accountant, again.epsilon_before) == ("rdp", other.epsilon_after)


def test_a_plan_that_may_use_all_of_delta_leaves_nothing_for_anybody_else(book: Books) -> None:
    b = book(accountant="prv", target=2.6).open(planned_steps=500)
    spent = b.reserve(1).epsilon_after
    with pytest.raises(DPBudgetExceededError, match="epsilon inf") as refused:
        b.reserve(1, run="run_b")
    assert refused.value.current_epsilon == spent <= refused.value.max_epsilon
    assert b.reserve(2).accountant == "prv"  # the plan itself goes on


def test_the_shares_of_delta_never_add_up_to_more_than_delta() -> None:
    for target in (0.5, 2.0, 8.0):
        for steps in (1, 30, 300):
            terms = Terms(unit="datum", target_epsilon=target, target_delta=DELTA)
            plan = Plan(run_id="r", event=EVENT, steps=steps, target_epsilon=target)
            share = filter_delta(Fold(plan=plan, planned=1, charges=1), terms)
            assert share >= 0.0
            assert share + pld_delta(1.0, 0.1, steps, target) <= DELTA or share == 0.0


def test_a_retry_after_a_crash_counts_as_a_step_of_the_plan_and_beyond_the_plan_the_filter_prices(
    book: Books,
) -> None:
    b = book(accountant="prv").open(planned_steps=2)
    assert b.reserve(1).accountant == "prv"
    retried = b.reserve(1)
    assert (retried.attempt, retried.accountant) == (2, "prv")
    assert b.reserve(2).accountant == "rdp"


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
@pytest.mark.parametrize("steps", [0, 3, 9])
def test_a_forecast_of_n_steps_is_what_n_steps_are_charged(book: Books, accountant: str, steps: int) -> None:
    b = book(accountant=accountant).open(planned_steps=6)  # nine steps go beyond the plan
    b.reserve(1)
    said = b.ledger.forecast(
        b.scope, run_id="run_a", event=EVENT, steps=steps, accountant=accountant, releases_left=None
    )
    assert said.epsilon_now == b.epsilon()
    for seq in range(2, 2 + steps):
        b.reserve(seq)
    assert b.epsilon() == pytest.approx(said.epsilon_after, abs=1e-9)


@pytest.mark.parametrize(("accountant", "planned"), [("rdp", None), ("prv", 4), ("prv", 200)])
def test_as_many_steps_remain_as_the_gate_then_lets_through(
    book: Books, accountant: str, planned: int | None
) -> None:
    b = book(accountant=accountant, target=3.0).open(planned_steps=planned)
    said = b.ledger.forecast(b.scope, run_id="run_a", event=EVENT, steps=1, accountant=accountant, releases_left=None)
    assert said.steps_remaining > 3
    for seq in range(1, said.steps_remaining + 1):
        b.reserve(seq)
    assert b.ledger.refusal(b.scope, run_id="run_a", event=EVENT, accountant=accountant) is not None
    with pytest.raises(DPBudgetExceededError):
        b.reserve(said.steps_remaining + 1)
    assert b.charges() == said.steps_remaining
    assert b.epsilon() <= 3.0


def test_a_plan_of_which_not_one_step_is_affordable_is_refused_when_it_is_made(book: Books) -> None:
    with pytest.raises(DPBudgetExceededError):
        book(accountant="prv", target=0.1, event=Gaussian(noise_multiplier=0.5)).open(planned_steps=5)


def test_without_a_target_every_step_is_affordable_and_none_remain_to_be_counted(book: Books) -> None:
    b = book(target=None).open()
    for target in (None, math.inf):
        b.open(run=f"run_{target}", target_epsilon=target)  # both mean the same terms
    said = b.ledger.forecast(b.scope, run_id="run_a", event=EVENT, steps=5, accountant="rdp", releases_left=None)
    assert said.steps_remaining == -1
    assert b.ledger.spent(b.scope).target_epsilon is None


def test_the_message_shows_enough_digits_to_see_that_it_is_over() -> None:
    terms = Terms(unit="datum", target_epsilon=4.0, target_delta=1e-5)
    for after, shown in (
        (4.104, "4.104, over its 4.000 at delta 1e-05"),
        (4.0000004, "4.000000400, over its 4.0000"),
    ):
        with pytest.raises(DPBudgetExceededError) as refused:
            refuse_over(Price(before=3.9, after=after, accountant="rdp"), terms, "data-1")
        assert f"step would bring data-1 to epsilon {shown}" in refused.value.message
    refuse_over(Price(before=3.9, after=4.0, accountant="rdp"), terms, "data-1")


def test_a_mixed_history_is_the_sum_of_its_costs(book: Books) -> None:
    b = book(target=30.0).open()
    other = Gaussian(noise_multiplier=2.0)
    b.reserve(1)
    b.reserve(1, run="run_b", event=other)
    assert b.epsilon() == epsilon(add(cost(EVENT), cost(other)), DELTA)

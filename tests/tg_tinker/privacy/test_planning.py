"""One unknown from the others: the answer keeps the target, and the next better one does not."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tg_tinker.errors import InvalidRequestError
from tg_tinker.privacy import gate_epsilon, plan
from tg_tinker.privacy.accounting import prv_epsilon
from tg_tinker.privacy.solving import largest, smallest
from tg_tinker.types import TrainingConfig
from tg_tinker_server.dp import calibration

GIVEN: dict[str, Any] = {
    "noise_multiplier": 0.8,
    "epsilon": 3.0,
    "steps": 200,
    "batch_size": 256,
    "dataset_size": 20_000,
}
BETTER = {"noise_multiplier": -1e-4, "steps": 1, "batch_size": 1, "dataset_size": -1}


def asked(unknown: str, **changed: Any) -> Any:
    return plan(**{**GIVEN, "delta": 1e-5, unknown: None, **changed})


@pytest.mark.parametrize("unknown", list(BETTER))
def test_the_answer_keeps_the_target_and_the_next_better_one_does_not(unknown: str) -> None:
    found = asked(unknown)
    assert found.solved == unknown
    assert found.epsilon <= found.target_epsilon == 3.0
    assert found.epsilon == gate_epsilon(
        {(found.noise_multiplier, found.batch_size / found.dataset_size): found.steps}, 1e-5
    )
    assert asked("epsilon", **{unknown: getattr(found, unknown)}).epsilon == found.epsilon
    better = getattr(found, unknown) + BETTER[unknown]
    assert asked("epsilon", **{unknown: better}).epsilon > 3.0


def test_integers_stay_integers_and_noise_is_a_multiple_of_a_ten_thousandth() -> None:
    for unknown in ("steps", "batch_size", "dataset_size"):
        assert type(getattr(asked(unknown), unknown)) is int
    sigma = asked("noise_multiplier").noise_multiplier
    assert sigma == round(sigma, 4)


def test_the_servers_calibration_agrees() -> None:
    """The server's "auto" solves by bisection of its own, to 1e-4 relative."""
    theirs = calibration.noise_multiplier_for(
        target_epsilon=3.0, target_delta=1e-5, sample_rate=256 / 20_000, steps=200
    )
    assert asked("noise_multiplier").noise_multiplier == pytest.approx(theirs, abs=2e-4)
    event = calibration.step_event(0.8, 256 / 20_000)
    zero = calibration.repeated(calibration.cost(event), 0)
    steps = calibration.steps_remaining(zero, event, target_epsilon=3.0, delta=1e-5)
    assert asked("steps").steps == steps


@settings(max_examples=15, deadline=None)
@given(
    unknown=st.sampled_from(sorted(BETTER)),
    epsilon=st.floats(0.5, 20.0),
    steps=st.integers(1, 5000),
    batch=st.integers(1, 500),
    times=st.integers(1, 1000),
    sigma=st.floats(0.3, 10.0),
    share=st.floats(1e-6, 0.99),
)
def test_whatever_is_asked_the_answer_keeps_the_target_or_there_is_none(
    unknown: str, epsilon: float, steps: int, batch: int, times: int, sigma: float, share: float
) -> None:
    values: dict[str, Any] = {
        "steps": steps,
        "batch_size": batch,
        "dataset_size": batch * times,
        "noise_multiplier": sigma,
    }
    delta = share / (batch * times)
    below_one_over = math.ceil(1 / delta) - 1  # no dataset may be larger at this delta
    best = {"noise_multiplier": 1e6, "steps": 1, "batch_size": 1, "dataset_size": below_one_over}[unknown]

    def spends(values: dict[str, Any]) -> float:
        rate = values["batch_size"] / values["dataset_size"]
        return gate_epsilon({(values["noise_multiplier"], rate): values["steps"]}, delta)

    asked_for = {**values, unknown: None, "epsilon": epsilon, "delta": delta}
    if spends({**values, unknown: best}) > epsilon:
        with pytest.raises(InvalidRequestError, match=r"out of reach|promises no epsilon|publishing a whole unit"):
            plan(**asked_for)
        return
    found = plan(**asked_for)
    assert gate_epsilon(found.histogram, delta) == found.epsilon <= epsilon
    TrainingConfig(  # what the server takes
        model_ref="bigram", batch_size=found.batch_size, max_steps=found.steps, dp_config=found.dp_config()
    )


def test_prv_gives_more_for_the_same_target() -> None:
    by_gate, by_prv = (asked("steps", epsilon=2.0, accountant=name) for name in ("rdp", "prv"))
    assert by_prv.steps > by_gate.steps
    assert prv_epsilon(0.8, 256 / 20_000, by_prv.steps, 1e-5) <= 2.0
    assert by_prv.dp_config().accountant_type == "prv"


def test_without_sampling_the_sizes_do_not_matter() -> None:
    found = plan(epsilon=8, delta=1e-5, steps=30, sampling="none")
    assert (found.sample_rate, found.releases, found.batch_size) == (1.0, 30, None)
    assert found.epsilon == gate_epsilon({(found.noise_multiplier, 1.0): 30}, 1e-5) <= 8
    config = found.dp_config(dataset_id="d")
    assert (config.sampling, config.dataset_size, config.target_epsilon) == ("none", None, 8)


def test_participations_are_counted_in_passes_over_the_data() -> None:
    found = plan(
        epsilon=8, delta=1e-5, noise_multiplier=2.0, batch_size=10, dataset_size=100, sampling="max_participation"
    )
    assert found.participations is not None
    assert found.steps == found.participations * 10  # disjoint batches: a pass of ten steps costs one release
    assert gate_epsilon({(2.0, 1.0): found.participations}, 1e-5) == found.epsilon <= 8
    assert gate_epsilon({(2.0, 1.0): found.participations + 1}, 1e-5) > 8
    assert [found.releases_after(n) for n in (1, 10, 11, found.steps)] == [1, 1, 2, found.participations]
    assert found.dp_config().max_participation == found.participations
    bigger = plan(epsilon=8, delta=1e-5, noise_multiplier=2.0, steps=55, batch_size=10, sampling="max_participation")
    assert bigger.participations == math.ceil(55 * 10 / bigger.dataset_size) <= found.participations


def test_given_participations_take_the_place_of_steps() -> None:
    found = plan(epsilon=8, delta=1e-5, participations=4, sampling="max_participation")
    assert (found.releases, found.steps, found.solved) == (4, 4, "noise_multiplier")
    more = plan(epsilon=8, delta=1e-5, participations=4, steps=500, sampling="max_participation")
    assert more.noise_multiplier == found.noise_multiplier
    assert [more.releases_after(n) for n in (1, 4, 500)] == [1, 4, 4]
    fewer = plan(noise_multiplier=2.0, delta=1e-5, participations=4, steps=2, sampling="max_participation")
    assert fewer.releases == 2  # nobody takes part in more steps than there are


def test_curves_rise_to_the_plans_own_figures() -> None:
    found = asked("noise_multiplier")
    for name in ("rdp", "pld", "prv", "gdp"):
        curve = found.curve(name)
        steps, values = zip(*curve.points, strict=True)
        assert steps[:2] == (0, 1)
        assert steps[-1] == 200
        assert list(values) == sorted(values)
        assert values[-1] == found.epsilon_by(name)
        assert curve.bound == (name != "gdp")
    assert found.epsilon_by("rdp") == found.epsilon


def test_an_accountant_that_cannot_say_has_no_curve() -> None:
    found = plan(noise_multiplier=0.3, delta=1e-5, steps=20_000, sampling="none")
    assert found.epsilon_by("prv") is None
    assert found.epsilon_by("gdp") is None
    assert found.curve("gdp").points == ()
    with pytest.raises(InvalidRequestError, match="no accountant 'moments'"):
        found.epsilon_by("moments")


def test_delta_is_by_default_half_of_one_over_n() -> None:
    assert plan(epsilon=3, steps=10, batch_size=10, dataset_size=1000).delta == 1 / 2000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "missing: noise_multiplier, epsilon, steps, batch_size, dataset_size"),
        ({**GIVEN}, "none is missing"),
        ({**GIVEN, "steps": None, "epsilon": None}, "missing: epsilon, steps"),
        ({**GIVEN, "dataset_size": None}, "give delta"),
        ({**GIVEN, "steps": None, "delta": 1.0}, "delta must lie strictly"),
        ({**GIVEN, "steps": None, "epsilon": -1}, "epsilon must be positive"),
        ({**GIVEN, "steps": None, "epsilon": math.nan}, "epsilon must be positive"),
        ({**GIVEN, "steps": None, "noise_multiplier": math.inf}, "noise_multiplier must be positive"),
        ({**GIVEN, "epsilon": None, "steps": 0}, "steps must be a whole number"),
        ({**GIVEN, "epsilon": None, "steps": 2.5}, "steps must be a whole number"),
        ({**GIVEN, "epsilon": None, "batch_size": 20_001}, "larger than dataset_size"),
        ({**GIVEN, "steps": None, "accountant": "gdp"}, "solved by 'rdp' or 'prv'"),
        ({**GIVEN, "steps": None, "sampling": "shuffle"}, "not 'shuffle'"),
        ({**GIVEN, "steps": None, "participations": 3}, "participations"),
        ({**GIVEN, "noise_multiplier": None, "epsilon": 0.05}, "promises no epsilon below"),
        ({**GIVEN, "steps": None, "noise_multiplier": 0.2}, "not one step fits"),
        ({**GIVEN, "batch_size": None, "noise_multiplier": 0.2}, "not even a batch of one"),
        ({**GIVEN, "dataset_size": None, "noise_multiplier": 0.1, "delta": 1e-9}, "no dataset is large enough"),
        ({**GIVEN, "epsilon": None, "noise_multiplier": 0.001}, "epsilon is infinite"),
        ({**GIVEN, "epsilon": None, "delta": 1 / 20_000}, "delta 5e-05 is not below 1 / 20000"),
        (
            {"epsilon": 1.0, "delta": 1e-5, "noise_multiplier": 0.6, "steps": 5000, "batch_size": 64},
            "needs a dataset of at least 24415114 units, and delta 1e-05 is not below",
        ),
    ],
)
def test_what_cannot_be_planned_says_why_and_what_to_change(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        plan(**arguments)
    assert words in caught.value.message
    assert caught.value.field


@given(st.integers(0, 1000), st.integers(1, 1000))
def test_the_last_that_fits_is_found(limit: int, most: int) -> None:
    assert largest(lambda n: n <= limit, most=most) == min(limit, most)


@given(st.integers(1, 1000), st.integers(1, 1000), st.integers(0, 1000))
def test_the_first_that_fits_is_found(limit: int, least: int, more: int) -> None:
    most = least + more
    found = smallest(lambda n: n >= limit, least=least, most=most)
    assert found == (None if limit > most else max(limit, least))

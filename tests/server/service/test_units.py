"""Whose a datum is, and which calls give away that a loss was computed over several."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Literal, cast

import numpy as np
import pytest

from tg_tinker._arguments import keyed_units
from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import DPConfig, TrainingConfig
from tg_tinker.types.datum import Datum, ModelInput, TensorData
from tg_tinker.types.losses import Loss
from tg_tinker.wire.calls import LossPass
from tg_tinker_server.dp.events import Gaussian
from tg_tinker_server.dp.rng import SecureNormal
from tg_tinker_server.engine.requests import OF_A_PROMPT, UNNAMED
from tg_tinker_server.ledger.reservation import DatasetScope
from tg_tinker_server.service import units
from tg_tinker_server.service.policy import KeyPolicy
from tg_tinker_server.service.run import PrivateRun, Run
from tg_tinker_server.service.units import PassWatch, UnitOf, named, units_of

Unit = Literal["datum", "group", "pair", "user", "sequence", "site"]
CROSS_ENTROPY, IMPORTANCE = Loss.of("cross_entropy"), Loss.of("importance_sampling")


def a_run(unit: Unit | None = "datum", *, run_id: str = "r", secret: bytes = b"s" * 32, **privacy: Any) -> Run:
    """A run of which only its privacy and its key count."""
    dp = None if unit is None else DPConfig(privacy_unit=unit, **privacy)
    config = TrainingConfig(model_ref="tiny", dp_config=dp, batch_size=1)
    private = None
    if dp is not None:
        private = PrivateRun(
            config=dp,
            scope=DatasetScope(tenant="t", dataset_id="d"),
            event=Gaussian(noise_multiplier=1.0),
            noise_multiplier=1.0,
            accountant="rdp",
            noise=SecureNormal(),
        )
    return Run(
        tenant="t",
        run_id=run_id,
        config=config,
        session=cast(Any, None),
        lane=cast(Any, None),
        private=private,
        secret=secret,
        created=datetime.now(UTC),
    )


def supervised(*tokens: int, weights: list[float] | None = None, **more: TensorData) -> Datum:
    inputs: dict[str, Any] = {
        "target_tokens": [*tokens[1:], 0],
        "weights": [1.0] * len(tokens) if weights is None else weights,
        **more,
    }
    return Datum(ModelInput.from_ints(tokens), inputs)


def answer(prompt: list[int], sampled: list[int], *, advantage: float = 1.0) -> Datum:
    """A datum as RL scripts lay it out: the last sampled token is a target only."""
    tokens = [*prompt, *sampled]
    padding = [0.0] * (len(prompt) - 1)
    return Datum(
        ModelInput.from_ints(tokens[:-1]),
        {
            "target_tokens": tokens[1:],
            "logprobs": padding + [-1.5] * len(sampled),
            "advantages": padding + [advantage] * len(sampled),
        },
    )


def with_id(datum: Datum, *unit: int, name: str = "x_unit") -> Datum:
    return Datum(datum.model_input, {**datum.loss_fn_inputs, name: TensorData(list(unit), dtype="int64")})


def test_records_are_known_by_their_content_unless_they_carry_ids() -> None:
    data = [supervised(1, 2), supervised(1, 2)]
    assert units_of(a_run(), data, CROSS_ENTROPY) is None
    assert units_of(a_run(None), [with_id(d, 1) for d in data], CROSS_ENTROPY) is None, "no privacy, no units"
    ids = units_of(a_run(), [with_id(data[0], 7), with_id(data[1], 8)], CROSS_ENTROPY)
    assert ids is not None
    assert len(set(ids)) == 2


@pytest.mark.parametrize("name", units.UNIT_INPUTS)
def test_ids_in_datums_are_units_of_any_kind(name: str) -> None:
    data = [with_id(supervised(1, i), i % 2, name=name) for i in range(4)]
    for unit in ("datum", "group", "pair", "user", "site"):
        ids = units_of(a_run(cast(Unit, unit)), data, CROSS_ENTROPY)
        assert ids is not None
        assert ids[0] == ids[2] != ids[1] == ids[3]


def test_ids_are_keyed_as_a_native_client_keys_them() -> None:
    run = a_run("user")
    ids = units_of(run, [with_id(supervised(1, 2), 7, 9)], CROSS_ENTROPY)
    assert ids == keyed_units(run.mac("unit-ids", b""), ["7,9"], 1)
    assert ids != units_of(a_run("user", secret=b"z" * 32), [with_id(supervised(1, 2), 7, 9)], CROSS_ENTROPY)


def test_half_of_the_ids_or_two_names_are_refused() -> None:
    half = [with_id(supervised(1, 2), 1), supervised(3, 4)]
    with pytest.raises(InvalidRequestError, match="1 of 2 datums"):
        units_of(a_run(), half, CROSS_ENTROPY)
    two = [with_id(supervised(1, 2), 1), with_id(supervised(3, 4), 1, name="privacy_unit")]
    with pytest.raises(InvalidRequestError, match="same name"):
        units_of(a_run(), two, CROSS_ENTROPY)
    both = [with_id(with_id(supervised(1, 2), 1), 2, name="privacy_unit")]
    with pytest.raises(InvalidRequestError, match="same name"):
        units_of(a_run(), both, CROSS_ENTROPY)


@pytest.mark.parametrize(
    "tensor", [TensorData([1.5], dtype="float32"), TensorData(np.zeros(0), dtype="int64", shape=[0])]
)
def test_an_id_that_is_no_number_is_refused(tensor: TensorData) -> None:
    with pytest.raises(InvalidRequestError, match="int64"):
        units_of(a_run(), [supervised(1, 2, x_unit=tensor)], CROSS_ENTROPY)


def test_answers_to_one_prompt_are_one_unit() -> None:
    data = [
        answer([1, 2, 3], [4, 5]),
        answer([1, 2, 3], [9, 9, 9], advantage=-1.0),
        answer([1, 2], [3, 4]),
        answer([8], [1]),
        answer([1, 2, 3], [7], advantage=0.0),
    ]
    ids = units_of(a_run("group"), data, IMPORTANCE)
    assert ids is not None
    assert ids[0] == ids[1] == ids[4], "whatever was answered, and whatever it is worth"
    assert len({ids[0], ids[2], ids[3]}) == 3


def changed(datum: Datum, **inputs: Any) -> Datum:
    return Datum(datum.model_input, {**datum.loss_fn_inputs, **inputs})


def test_a_script_without_old_log_probabilities_has_groups_too() -> None:
    """With zeros for them the whole answer was taken for the prompt, and every answer for a unit of its own."""
    zeros = [changed(answer([1, 2, 3], [s, 5]), logprobs=[0.0] * 4) for s in (7, 8)]
    certain = changed(answer([1, 2, 3], [9, 5]), logprobs=[0.0, 0.0, 0.0, -1.0])
    masked = changed(
        answer([1, 2, 3], [9, 6], advantage=0.0), logprobs=[0.0] * 4, sequence_ratio_mask=[0.0, 0.0, 1.0, 1.0]
    )
    data = [answer([1, 2, 3], [4]), *zeros, certain, masked]
    ids = units_of(a_run("group"), data, Loss.of("gspo"))
    assert ids is not None
    assert len(set(ids)) == 1
    assert ids[0].startswith(OF_A_PROMPT), "to be told from what callers name"


def test_an_answer_that_cannot_be_told_from_its_prompt_is_refused() -> None:
    nothing = changed(answer([1, 2, 3], [4]), logprobs=[0.0] * 3, advantages=[0.0] * 3)
    with pytest.raises(InvalidRequestError, match="zeros only"):
        units_of(a_run("group"), [answer([1, 2], [3]), nothing], IMPORTANCE)


def test_prompts_are_not_guessed_where_nothing_was_sampled() -> None:
    with pytest.raises(InvalidRequestError, match="where a prompt"):
        units_of(a_run("group"), [supervised(1, 2, weights=[0.0, 1.0])], CROSS_ENTROPY)
    with pytest.raises(InvalidRequestError, match="where a prompt"):
        units_of(a_run("group"), [answer([1], [2])], Loss(name="custom", loss_id="x"))


def test_neighbours_are_pairs() -> None:
    one, other, third = supervised(1, 2), supervised(1, 3), supervised(1, 4)
    ids = units_of(a_run("pair"), [one, other, one, third, one, other], CROSS_ENTROPY)
    assert ids is not None
    assert ids[0] == ids[1] != ids[2] == ids[3]
    assert ids[4] == ids[5] != ids[0], "equal pairs of one call are different pairs, as equal records are"
    assert all(i.startswith(UNNAMED) for i in ids), "known by their content, so never merged over calls"
    again = units_of(a_run("pair"), [one, other], CROSS_ENTROPY)
    assert again is not None
    assert again[0] == ids[0], "a repeated call repeats its units, so that they cannot count twice"
    joined = units_of(a_run("pair"), [supervised(1, 2, 3), supervised(4)], CROSS_ENTROPY)
    moved = units_of(a_run("pair"), [supervised(1, 2), supervised(3, 4)], CROSS_ENTROPY)
    assert joined != moved
    with pytest.raises(InvalidRequestError, match="has 3"):
        units_of(a_run("pair"), [one, other, third], CROSS_ENTROPY)


def test_a_user_cannot_be_guessed() -> None:
    with pytest.raises(InvalidRequestError, match="x_unit"):
        units_of(a_run("user"), [supervised(1, 2)], CROSS_ENTROPY)


def test_a_policy_that_names_units_leaves_nothing_to_say() -> None:
    data = [with_id(answer([1, 2], [3]), 1), with_id(answer([1, 2], [4]), 2)]
    by_prompt = units_of(a_run("group"), data, IMPORTANCE, unit_of="prompt")
    assert by_prompt is not None
    assert by_prompt[0] == by_prompt[1], "ids that split a prompt's group are not looked at"
    by_id = units_of(a_run("group"), data, IMPORTANCE, unit_of="ids")
    assert by_id is not None
    assert by_id[0] != by_id[1]
    assert units_of(a_run(), data, CROSS_ENTROPY, unit_of="datum") is None
    pairs = units_of(a_run("pair"), data, CROSS_ENTROPY, unit_of="adjacent_pair")
    assert pairs is not None
    assert pairs[0] == pairs[1]
    with pytest.raises(InvalidRequestError, match="x_unit"):
        units_of(a_run("group"), [answer([1, 2], [3])], IMPORTANCE, unit_of="ids")


@pytest.mark.parametrize("unit_of", [None, "ids", "prompt", "adjacent_pair", "datum"])
def test_a_call_without_datums_has_no_units(unit_of: UnitOf | None) -> None:
    assert not units_of(a_run("user"), [], CROSS_ENTROPY, unit_of=unit_of)


def forward(*data: Datum, loss: Loss = CROSS_ENTROPY) -> LossPass:
    return LossPass(data=data, loss=loss, train=False)


def backward(*data: Datum, loss: Loss = CROSS_ENTROPY) -> LossPass:
    return LossPass(data=data, loss=loss)


ONE, TWO = supervised(1, 2), supervised(3, 4)
DERIVED = supervised(1, 2, weights=[0.5, 0.25])


def test_a_custom_loss_of_the_client_gives_itself_away() -> None:
    watch, run = PassWatch(), a_run()
    assert watch.coupling_of(run, backward(ONE, TWO)) == "independent"
    assert watch.coupling_of(run, forward(ONE, TWO)) == "independent"
    assert watch.coupling_of(run, backward(DERIVED, TWO)) == "batch"
    assert watch.coupling_of(run, backward(ONE, TWO)) == "independent", "the weights of before"
    elsewhere = supervised(5, 6, weights=[0.2, 0.3])
    assert watch.coupling_of(run, backward(elsewhere, TWO)) == "independent", "not looked at"
    assert watch.coupling_of(run, backward(elsewhere, supervised(1, 2, weights=[0, 1]))) == "batch"


@pytest.mark.parametrize("unit", ["datum", "group", "pair", "user", "site"])
def test_a_loss_over_several_units_is_refused_whatever_a_unit_is(unit: Unit) -> None:
    watch, run = PassWatch(), a_run(unit)
    whose = None if unit == "datum" else ("a", "b")
    watch.coupling_of(run, replace(forward(ONE, TWO), units=whose))
    assert watch.coupling_of(run, replace(backward(DERIVED, TWO), units=whose)) == "batch"
    negative = replace(backward(supervised(8, 9, weights=[0.0, -1e-6]), TWO), units=whose)
    assert PassWatch().coupling_of(run, negative) == "batch"
    graph = replace(negative, loss=Loss(name="custom", loss_id="x"))
    assert PassWatch().coupling_of(run, graph) == "batch"


def test_one_unit_may_have_any_loss_of_its_own() -> None:
    watch, run = PassWatch(), a_run("pair")
    both = supervised(3, 4, weights=[0.0, -1.0])
    watch.coupling_of(run, replace(forward(ONE, TWO), units=("a", "a")))
    assert watch.coupling_of(run, replace(backward(DERIVED, both), units=("a", "a"))) == "independent"
    alone = a_run()
    watch.coupling_of(alone, forward(ONE))
    assert watch.coupling_of(alone, backward(DERIVED)) == "independent"
    # Sent back one at a time, but looked at together.
    watch.coupling_of(alone, forward(ONE, TWO))
    assert watch.coupling_of(alone, backward(DERIVED)) == "batch"


def test_units_that_are_looked_at_one_by_one_and_sent_back_later_are_refused() -> None:
    """Micro-batches of one: every derivative may depend on every forward pass before it."""
    watch, run = PassWatch(), a_run()
    negative = supervised(3, 4, weights=[-1.0, 0.5])
    for one in (ONE, TWO):
        watch.coupling_of(run, forward(one))
    assert watch.coupling_of(run, backward(DERIVED)) == "batch"
    assert watch.coupling_of(run, backward(negative)) == "independent", "the last one looked at"
    watch.coupling_of(run, forward(ONE))
    assert watch.coupling_of(run, backward(DERIVED)) == "independent", "forward and backward, then the next"
    assert PassWatch().coupling_of(run, backward(negative)) == "batch", "looked at elsewhere, if at all"


@pytest.mark.parametrize("finds_units", [False, True])
@pytest.mark.parametrize(("unit", "unit_of"), [("group", "prompt"), ("pair", "adjacent_pair"), ("user", "ids")])
def test_an_evaluation_needs_no_units(unit: Unit, unit_of: UnitOf, finds_units: bool) -> None:
    for policy_ in (None, policy(unit_of, unit)):
        found = named(a_run(unit), forward(ONE, TWO, ONE), policy=policy_, finds_units=finds_units)
        assert found.units is None


def test_runs_are_apart_and_a_step_ends_nothing() -> None:
    """A script that pipelines steps the batch before between the two passes of this one."""
    watch, run, other = PassWatch(), a_run(), a_run(run_id="other")
    watch.coupling_of(run, forward(ONE, TWO))
    assert watch.coupling_of(other, backward(DERIVED, TWO)) == "independent"
    run.step += 1
    assert watch.coupling_of(run, backward(DERIVED, TWO)) == "batch"


def test_what_came_before_a_restart_is_not_taken_for_harmless() -> None:
    run = a_run()
    run.restored = True
    assert PassWatch().coupling_of(run, backward(DERIVED, TWO)) == "batch"
    assert PassWatch().coupling_of(run, backward(DERIVED)) == "independent", "a unit alone"
    plain = [supervised(1, 2, weights=[0.0, 0.5]), supervised(3, 4, weights=[0.25, 0.25]), supervised(5)]
    assert PassWatch().coupling_of(run, backward(*plain)) == "independent"
    run.restored = False
    assert PassWatch().coupling_of(run, backward(DERIVED, TWO)) == "independent"


def test_what_is_attested_or_has_no_privacy_is_independent() -> None:
    negative = backward(supervised(1, 2, weights=[-1.0, 1.0]), TWO)
    assert PassWatch().coupling_of(a_run(custom_loss="independent"), negative) == "independent"
    assert PassWatch().coupling_of(a_run(None), negative) == "independent"
    admitted = replace(negative, coupling="batch")
    assert PassWatch().coupling_of(a_run(custom_loss="independent"), admitted) == "batch"
    answers = backward(answer([1], [2], advantage=-1.0), answer([3], [4]), loss=IMPORTANCE)
    assert PassWatch().coupling_of(a_run("group"), answers) == "independent", "judged where losses are refused"


def test_memory_is_bounded_and_the_newest_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "REMEMBERED", 3)
    watch, run = PassWatch(), a_run()
    watch.coupling_of(run, forward(*(supervised(1, i) for i in range(5))))
    assert watch.coupling_of(run, backward(supervised(1, 0, weights=[0.5, 0.5]), TWO)) == "independent"
    assert watch.coupling_of(run, backward(supervised(1, 4, weights=[0.5, 0.5]), TWO)) == "batch"


def policy(unit_of: UnitOf, unit: str) -> KeyPolicy:
    return KeyPolicy.model_validate(
        {"dataset_id": "d", "target_epsilon": 1.0, "target_delta": 1e-6, "unit_of": unit_of, "privacy_unit": unit}
    )


@pytest.mark.parametrize("finds_units", [False, True])
def test_a_policy_names_units_through_every_door(finds_units: bool) -> None:
    answers = (answer([1, 2], [3]), answer([1, 2], [4]))
    for unit_of, unit, loss in (
        ("datum", "datum", CROSS_ENTROPY),
        ("prompt", "group", IMPORTANCE),
        ("adjacent_pair", "pair", CROSS_ENTROPY),
    ):
        run, rule = a_run(cast(Unit, unit)), policy(cast(UnitOf, unit_of), unit)
        call = LossPass(data=answers, loss=loss)
        found = named(run, call, policy=rule, finds_units=finds_units).units
        assert found is None if unit_of == "datum" else len(set(found or ())) == 1
        with pytest.raises(InvalidRequestError, match="not the caller's to say"):
            named(run, replace(call, units=("a", "b")), policy=rule, finds_units=finds_units)
    run, rule = a_run("user"), policy("ids", "user")
    call = LossPass(data=tuple(with_id(d, 7) for d in answers), loss=CROSS_ENTROPY)
    by_id = named(run, call, policy=rule, finds_units=finds_units).units
    assert by_id == keyed_units(run.mac("unit-ids", b""), ["7", "7"], 2)
    plain = LossPass(data=answers, loss=CROSS_ENTROPY)
    assert named(run, replace(plain, units=("a", "b")), policy=rule, finds_units=finds_units).units == ("a", "b")
    for wrong in (replace(call, units=("a", "b")), plain):
        with pytest.raises(InvalidRequestError):
            named(run, wrong, policy=rule, finds_units=finds_units)


def test_an_owner_names_units_or_leaves_it_to_the_http_door() -> None:
    run, pair = a_run("pair"), LossPass(data=(ONE, TWO), loss=CROSS_ENTROPY)
    assert named(run, pair, policy=None, finds_units=False).units is None
    assert named(run, replace(pair, units=("a", "b")), policy=None, finds_units=False).units == ("a", "b")
    assert len(set(named(run, pair, policy=None, finds_units=True).units or ())) == 1

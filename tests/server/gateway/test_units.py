"""Whose a datum of a Tinker client is, and which calls give away that a loss was computed over several."""

from __future__ import annotations

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
from tg_tinker_server.gateway import units
from tg_tinker_server.gateway.units import PassWatch, UnitOf, units_of
from tg_tinker_server.ledger.reservation import DatasetScope
from tg_tinker_server.service.run import PrivateRun, Run

Unit = Literal["datum", "group", "pair", "user", "sequence", "site"]
CROSS_ENTROPY, IMPORTANCE = Loss.of("cross_entropy"), Loss.of("importance_sampling")


def a_run(unit: Unit | None = "datum", *, run_id: str = "r", secret: bytes = b"s" * 32) -> Run:
    """A run of which only its privacy and its key count."""
    dp = None if unit is None else DPConfig(privacy_unit=unit)
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
    assert ids == keyed_units(run.mac("unit-ids", b""), ["id 7,9"], 1)
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


def test_a_datum_without_a_sample_is_a_unit_of_its_own() -> None:
    nothing = answer([1, 2, 3], [4])
    nothing = Datum(
        nothing.model_input,
        {**nothing.loss_fn_inputs, "logprobs": [0.0] * 3, "advantages": [0.0] * 3},
    )
    ids = units_of(a_run("group"), [nothing, answer([1, 2], [3])], IMPORTANCE)
    assert ids is not None
    assert ids[0] != ids[1]


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


def test_a_custom_loss_of_the_client_gives_itself_away() -> None:
    watch, run = PassWatch(), a_run()
    assert watch.coupling_of(run, backward(supervised(1, 2))) == "independent"
    assert watch.coupling_of(run, forward(supervised(1, 2), supervised(3, 4))) == "independent"
    assert watch.coupling_of(run, backward(supervised(3, 4, weights=[0.2, 0.3]))) == "batch"
    assert watch.coupling_of(run, backward(supervised(3, 4))) == "independent", "the weights of before"
    assert watch.coupling_of(run, backward(supervised(5, 6, weights=[0.2, 0.3]))) == "independent", "not looked at"
    assert watch.coupling_of(run, backward(supervised(5, 6), supervised(1, 2, weights=[0, 1]))) == "batch"


def test_negative_weights_are_a_derivative() -> None:
    assert PassWatch().coupling_of(a_run(), backward(supervised(1, 2, weights=[0.0, -1e-6]))) == "batch"
    graph = Loss(name="custom", loss_id="x")
    assert PassWatch().coupling_of(a_run(), backward(supervised(1, 2, weights=[0.0, -1.0]), loss=graph)) == "batch"


def test_a_step_ends_what_was_seen_and_runs_are_apart() -> None:
    watch, run, other = PassWatch(), a_run(), a_run(run_id="other")
    changed = backward(supervised(1, 2, weights=[0.5, 0.5]))
    watch.coupling_of(run, forward(supervised(1, 2)))
    assert watch.coupling_of(other, changed) == "independent"
    assert watch.coupling_of(run, changed) == "batch"
    watch.stepped(run)
    assert watch.coupling_of(run, changed) == "independent"
    watch.coupling_of(run, forward(supervised(1, 2)))
    watch.forget("t", "r")
    assert watch.coupling_of(run, changed) == "independent"


@pytest.mark.parametrize("unit", ["group", "pair", "user", "site"])
def test_a_unit_that_holds_the_coupling_may_have_its_loss(unit: Unit) -> None:
    watch, run = PassWatch(), a_run(unit)
    watch.coupling_of(run, forward(supervised(1, 2)))
    assert watch.coupling_of(run, backward(supervised(1, 2, weights=[-1.0, 1.0]))) == "independent"


def test_what_a_policy_attests_or_has_no_privacy_is_independent() -> None:
    negative = backward(supervised(1, 2, weights=[-1.0, 1.0]))
    assert PassWatch().coupling_of(a_run(), negative, custom_loss="independent") == "independent"
    assert PassWatch().coupling_of(a_run(None), negative) == "independent"
    assert PassWatch().coupling_of(a_run(), backward(answer([1], [2], advantage=-1.0), loss=IMPORTANCE)) == (
        "independent"
    ), "losses over groups are judged where the run's unit is known to the service"


def test_memory_is_bounded_and_the_newest_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "REMEMBERED", 3)
    watch, run = PassWatch(), a_run()
    watch.coupling_of(run, forward(*(supervised(1, i) for i in range(5))))
    assert watch.coupling_of(run, backward(supervised(1, 0, weights=[0.5, 0.5]))) == "independent"
    assert watch.coupling_of(run, backward(supervised(1, 4, weights=[0.5, 0.5]))) == "batch"

"""What a private run refuses of datums because of what they couple."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tg_tinker.errors import DPUnsupportedError
from tg_tinker.types import DPConfig
from tg_tinker.types.datum import Datum, ModelInput, TensorData
from tg_tinker.types.losses import Loss
from tg_tinker.wire.calls import LossPass
from tg_tinker_server.service.datums import refuse_coupled

CUSTOM = Loss(name="custom", loss_id="loss_0")


def a_run(unit: str = "datum", **settings: Any) -> Any:
    return SimpleNamespace(private=SimpleNamespace(config=DPConfig(privacy_unit=unit, **settings)))


def custom(name: str, *values: list[float], train: bool = True, units: tuple[str, ...] | None = None) -> LossPass:
    def datum(row: list[float]) -> Datum:
        targets = TensorData([1] * len(row), "int64")
        return Datum(
            ModelInput.from_ints([1] * len(row)), {"target_tokens": targets, name: TensorData(row, "float32")}
        )

    return LossPass(data=tuple(map(datum, values)), loss=CUSTOM, train=train, units=units)


CENTRED = [
    custom("advantages", [0.5, 0.5]),
    custom("scores", [1.0], [-1.0]),
    custom("scores", [0.0, 1.5, -0.5]),
]


@pytest.mark.parametrize("call", CENTRED)
@pytest.mark.parametrize("unit", ["datum", "sequence", "pair"])
def test_a_graph_that_reads_advantages_needs_the_group_as_its_unit(call: LossPass, unit: str) -> None:
    with pytest.raises(DPUnsupportedError, match="centred over a group"):
        refuse_coupled(a_run(unit), call)


@pytest.mark.parametrize("call", CENTRED)
def test_it_is_taken_where_the_group_is_the_unit_or_somebody_attests(call: LossPass) -> None:
    refuse_coupled(a_run(custom_loss="independent"), call)
    whole = LossPass(data=call.data, loss=call.loss, units=("g",) * len(call.data))
    refuse_coupled(a_run("group"), whole)
    refuse_coupled(a_run(), LossPass(data=call.data, loss=call.loss, train=False))


@pytest.mark.parametrize("values", [[0.0, 1.0], [-2.5, -0.1], [0.0, 0.0]])
def test_weights_and_log_probabilities_are_no_advantages(values: list[float]) -> None:
    refuse_coupled(a_run(), custom("old", values, values))

"""Settings of a run that federated training adds: what they may be, and that older texts still mean the same."""

import pytest
from pydantic import ValidationError

from tg_tinker.types import DPConfig, LoRAConfig, OptimizerConfig, TrainingConfig
from tg_tinker.wire.runs import config_from_json, config_to_json


def test_they_are_off_unless_asked_for() -> None:
    assert (LoRAConfig().frozen_factor, OptimizerConfig().proximal_mu, DPConfig().privacy_unit) == (
        None,
        0.0,
        "datum",
    )


@pytest.mark.parametrize("factor", ["a", "b", None])
def test_they_cross_the_wire(factor: str | None) -> None:
    config = TrainingConfig(
        model_ref="tiny",
        lora_config=LoRAConfig.model_validate({"frozen_factor": factor}),
        optimizer=OptimizerConfig(proximal_mu=0.01),
        dp_config=DPConfig(privacy_unit="site"),
    )
    assert config_from_json(config_to_json(config)) == config


@pytest.mark.parametrize("factor", ["A", "lora_A", "both", "", "ab", 1, True])
def test_only_a_or_b_can_be_frozen(factor: object) -> None:
    with pytest.raises(ValidationError, match="'a' or 'b'"):
        LoRAConfig.model_validate({"frozen_factor": factor})


def test_a_configuration_from_before_them_is_read_with_their_defaults() -> None:
    old = (
        '{"model_ref":"tiny","lora_config":{"rank":4},"optimizer":{"name":"sgd"},"dp_config":{"privacy_unit":"user"}}'
    )
    config = config_from_json(old)
    assert config.lora_config == LoRAConfig(rank=4)
    assert config.optimizer == OptimizerConfig(name="sgd", proximal_mu=0.0)

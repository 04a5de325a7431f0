"""What a Tinker client may ask about privacy, by the model's name, by the optimizer and at a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import pytest

from tg_tinker.errors import DPUnsupportedError, InvalidRequestError
from tg_tinker.types import TrainingConfig
from tg_tinker_server.gateway.dp_request import DPRequest, model_and_request
from tg_tinker_server.gateway.privacy import PLANNED_STEPS, step_params, training_config
from tg_tinker_server.service.caller import Caller
from tg_tinker_server.service.policy import KeyPolicy
from tg_tinker_server.service.privacy import resolve_noise_multiplier

ATTENTION_ONLY = {"rank": 4, "seed": 7, "train_attn": True, "train_mlp": False, "train_unembed": False}


@dataclass(frozen=True)
class _Key:
    """A caller of whom only the policy counts here."""

    policy: Any = None


def made(base_model: str = "tiny", optimizer: dict[str, Any] | None = None, policy: Any = None) -> TrainingConfig:
    caller = cast(Caller, _Key(policy))
    return training_config(
        base_model=base_model, lora=ATTENTION_ONLY, optimizer=optimizer, metadata={"a": "b"}, caller=caller
    )


@pytest.mark.parametrize("name", ["Qwen/Qwen3-8B", "vector:10", "gpt:peft:131072", "/abs/dir"])
def test_a_name_without_a_suffix_stays_as_it_is(name: str) -> None:
    assert model_and_request(name) == (name, None)


def test_a_suffix_says_everything_in_any_order() -> None:
    name, asked = model_and_request("Qwen/Qwen3-8B:dp-eps4-delta1e-6-clip0.5-steps200-noise1.1")
    assert name == "Qwen/Qwen3-8B"
    assert asked == DPRequest(
        target_epsilon=4.0, target_delta=1e-6, max_grad_norm=0.5, planned_steps=200, noise_multiplier=1.1
    )
    assert model_and_request("m:dp-steps3-eps0.5")[1] == DPRequest(target_epsilon=0.5, planned_steps=3)
    assert model_and_request("gpt:peft:131072:dp-eps1e1")[0] == "gpt:peft:131072"


@pytest.mark.parametrize(
    ("suffix", "why"),
    [
        (":dp", "does not read"),
        (":dp-", "does not read"),
        (":dp4", "does not read"),
        (":dp-eps", "does not read"),
        (":dp-eps-4", "does not read"),
        (":dp-epsilon4", "does not read"),
        (":DP-eps4", "does not read"),
        (":dp_eps4", "does not read"),
        (": dp-eps4", "does not read"),
        (":dp-eps4 ", "does not read"),
        (":dp-eps4-", "does not read"),
        (":dp-eps4-delta", "does not read"),
        (":dp-eps4-sigma2", "does not read"),
        (":dp-epsnan", "does not read"),
        (":dp-epsinf", "does not read"),
        (":dp-eps4e", "does not read"),
        (":dp-eps0", "above 0"),
        (":dp-eps1e999", "above 0"),
        (":dp-eps4-noise0", "above 0"),
        (":dp-eps4-steps1.5", "whole number"),
        (":dp-eps4-steps1e3", "whole number"),
        (":dp-eps4-eps5", "twice"),
        (":dp-delta1e-6", "no eps"),
        (":dp-eps4:dp-eps5", "once"),
        (":dp-eps4:peft", "at the end"),
    ],
)
def test_a_suffix_that_cannot_be_read_is_refused_and_never_ignored(suffix: str, why: str) -> None:
    with pytest.raises(InvalidRequestError, match=why) as refused:
        model_and_request("tiny" + suffix)
    assert refused.value.field == "base_model"
    with pytest.raises(InvalidRequestError):
        made("tiny" + suffix)


def test_without_a_word_about_privacy_a_run_has_none() -> None:
    config = made(optimizer={"type": "adamw"})
    assert not config.private
    assert config.lora_config is not None
    assert (config.lora_config.rank, config.lora_config.alpha, config.seed) == (4, 32.0, 7)
    assert config.lora_config.target_modules == ["@attention"]
    assert (config.optimizer.name, config.optimizer.betas, config.optimizer.eps) == ("adamw", (0.9, 0.95), 1e-12)
    assert config.expected_batch_size == 1
    assert config.metadata == {"a": "b"}
    assert config == made(optimizer=None)


def test_flags_choose_groups_of_layers_and_none_is_refused() -> None:
    def groups(**flags: bool) -> Any:
        caller = cast(Caller, _Key())
        lora = {"rank": 2, **flags}
        config = training_config(base_model="m", lora=lora, optimizer=None, metadata=None, caller=caller)
        return config.lora_config.target_modules if config.lora_config else None

    assert groups() == ["@attention", "@mlp", "@unembed"]
    assert groups(train_unembed=False) == ["@attention", "@mlp"]
    with pytest.raises(InvalidRequestError, match="nothing would be trained"):
        groups(train_attn=False, train_mlp=False, train_unembed=False)


def test_a_suffix_makes_a_private_run_with_noise_for_the_planned_steps() -> None:
    config = made("tiny:dp-eps4")
    assert config.model_ref == "tiny"
    assert config.dp_config is not None
    assert (config.dp_config.target_epsilon, config.dp_config.noise_multiplier) == (4.0, "auto")
    assert config.max_steps == PLANNED_STEPS
    fewer = made("tiny:dp-eps4-steps10")
    assert fewer.max_steps == 10
    assert resolve_noise_multiplier(fewer) < resolve_noise_multiplier(config)


def test_noise_that_is_given_needs_no_plan() -> None:
    config = made("tiny:dp-eps4-noise1.1-clip0.5-delta1e-6")
    dp = config.dp_config
    assert dp is not None
    assert (dp.noise_multiplier, dp.max_grad_norm, dp.target_delta) == (1.1, 0.5, 1e-6)
    assert config.max_steps is None


def test_the_optimizer_says_what_a_suffix_cannot() -> None:
    config = made(
        optimizer={
            "type": "dp_adamw",
            "target_epsilon": 8.0,
            "delta": 1e-6,
            "max_grad_norm": 0.3,
            "noise_multiplier": 1.2,
            "dataset_id": "clinic-7",
            "privacy_unit": "group",
            "sampling": "max_participation",
            "max_participation": 2,
            "diagnostics": "off",
            "custom_loss": "independent",
        }
    )
    dp = config.dp_config
    assert dp is not None
    assert (dp.target_epsilon, dp.target_delta, dp.max_grad_norm, dp.noise_multiplier) == (8.0, 1e-6, 0.3, 1.2)
    assert (dp.dataset_id, dp.privacy_unit, dp.sampling, dp.max_participation) == (
        "clinic-7",
        "group",
        "max_participation",
        2,
    )
    assert (dp.diagnostics, dp.custom_loss) == ("off", "independent")
    assert dp.merge_units, "clients cut their batches anywhere, so a group may come in two calls"
    assert made(optimizer={"type": "dp_adamw", "target_epsilon": 8, "noise_multiplier": "auto"}).max_steps == 200


def test_suffix_and_optimizer_add_up_and_may_not_disagree() -> None:
    config = made("tiny:dp-eps4", {"type": "dp_adamw", "target_epsilon": 4, "dataset_id": "d"})
    assert config.dp_config is not None
    assert (config.dp_config.target_epsilon, config.dp_config.dataset_id) == (4.0, "d")
    with pytest.raises(InvalidRequestError, match=r"asks for target_epsilon 4.0, the optimizer for 8"):
        made("tiny:dp-eps4", {"type": "dp_adamw", "target_epsilon": 8})


@pytest.mark.parametrize(
    ("optimizer", "named"),
    [
        ({"type": "dp_adamw", "target_epsilon": 8, "target_epsilom": 1}, "target_epsilom"),
        ({"type": "dp_adamw", "target_epsilon": 8, "enabled": False}, "enabled"),
        ({"type": "dp_adamw", "target_epsilon": 8, "allow_unnoised_steps": True}, "allow_unnoised_steps"),
        ({"type": "dp_adamw"}, "target_epsilon"),
        ({"type": "dp_adamw", "target_epsilon": "8"}, "target_epsilon"),
        ({"type": "dp_adamw", "target_epsilon": float("inf")}, "target_epsilon"),
        ({"type": "dp_adamw", "target_epsilon": 8, "noise_multiplier": 0}, "noise_multiplier"),
        ({"type": "dp_adamw", "target_epsilon": 8, "delta": 1e-5, "target_delta": 1e-5}, "target_delta twice"),
        ({"type": "dp_adamw", "target_epsilon": 8, "steps": 0}, "planned_steps"),
        ({"type": "dp_adamw", "target_epsilon": 8, "steps": True}, "planned_steps"),
        ({"type": "dp_adamw", "target_epsilon": 8, "privacy_unit": "household"}, "privacy_unit"),
        ({"type": "dp_adamw", "target_epsilon": 8, "delta": 2.0}, "target_delta"),
        ({"type": "adamw", "target_epsilon": 8}, "target_epsilon"),
        ({"type": "dimuon"}, "dimuon"),
    ],
)
def test_what_an_optimizer_cannot_say_is_refused_by_name(optimizer: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named):
        made(optimizer=optimizer)


def test_amplification_is_not_claimed_for_batches_of_a_client() -> None:
    with pytest.raises(DPUnsupportedError, match="choose their batches") as refused:
        made(optimizer={"type": "dp_adamw", "target_epsilon": 8, "sampling": "poisson", "dataset_size": 100})
    assert "max_participation" in refused.value.alternative


class _Recording:
    """A policy that notes what it was given."""

    def __init__(self) -> None:
        self.given: TrainingConfig | None = None

    def apply(self, config: TrainingConfig) -> TrainingConfig:
        self.given = config
        return config.model_copy(update={"metadata": {"policy": "applied"}})


def test_a_policy_has_the_last_word_and_is_handed_only_what_was_said() -> None:
    policy = _Recording()
    assert made(policy=policy).metadata == {"policy": "applied"}
    assert policy.given is not None
    assert policy.given.dp_config is None
    made("tiny:dp-eps4", policy=policy)
    assert policy.given.dp_config is not None
    assert policy.given.dp_config.model_fields_set == {"target_epsilon"}
    assert policy.given.max_steps is None
    made("tiny", {"type": "dp_adamw", "steps": 30}, policy=policy)
    assert policy.given.dp_config is not None
    assert policy.given.dp_config.model_fields_set == set()
    assert policy.given.max_steps == 30


POLICY = KeyPolicy(
    dataset_id="notes",
    target_epsilon=8.0,
    target_delta=1e-6,
    max_grad_norm=0.5,
    noise_multiplier="auto",
    planned_steps=50,
    diagnostics="owner",
)


@pytest.mark.parametrize("optimizer", [None, {"type": "adamw"}, {"type": "dp_adamw"}])
def test_plain_adam_on_a_key_with_a_policy_trains_privately(optimizer: dict[str, Any] | None) -> None:
    config = made(optimizer=optimizer, policy=POLICY)
    dp = config.dp_config
    assert dp is not None
    assert config.private
    assert (dp.dataset_id, dp.target_epsilon, dp.target_delta, dp.max_grad_norm) == ("notes", 8.0, 1e-6, 0.5)
    assert (dp.noise_multiplier, config.max_steps, config.batch_size) == ("auto", 50, 1)


def test_more_noise_than_the_policy_asks_is_given() -> None:
    longer = made("tiny:dp-eps8-steps100", policy=POLICY)
    assert longer.max_steps == 100
    assert resolve_noise_multiplier(longer) > resolve_noise_multiplier(made(policy=POLICY))


@pytest.mark.parametrize(
    ("base_model", "optimizer", "named"),
    [
        ("tiny:dp-eps9", None, "target_epsilon"),
        ("tiny:dp-eps8-delta1e-5", None, "target_delta"),
        ("tiny:dp-eps8-noise0.01", None, "noise_multiplier"),
        ("tiny:dp-eps8-steps10", None, "max_steps"),
        ("tiny", {"type": "dp_adamw", "dataset_id": "mine"}, "dataset_id"),
        ("tiny", {"type": "dp_adamw", "privacy_unit": "group"}, "privacy_unit"),
        ("tiny", {"type": "dp_adamw", "initial_weights": "public"}, "initial_weights"),
        ("tiny", {"type": "dp_adamw", "custom_loss": "independent"}, "custom_loss"),
        ("tiny", {"type": "dp_adamw", "sampling": "max_participation", "max_participation": 1}, "sampling"),
    ],
)
def test_nothing_that_is_sent_loosens_a_policy(base_model: str, optimizer: dict[str, Any] | None, named: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        made(base_model, optimizer, policy=POLICY)
    assert named in str(refused.value.field)


def test_a_step_takes_adam_of_either_kind() -> None:
    private = made("tiny:dp-eps4")
    sent = {
        "learning_rate": 1e-3,
        "beta1": 0.8,
        "beta2": 0.9,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "grad_clip_norm": 2.0,
    }
    for config in (private, made()):
        adam = step_params(config, sent, None)
        assert {k: getattr(adam, k) for k in sent} == sent
    assert step_params(private, None, {"type": "dp_adamw", "learning_rate": 1e-3}).learning_rate == 1e-3
    assert step_params(private, None, {"type": "dp_adamw", "target_epsilon": 4}).beta2 == 0.95
    assert step_params(private, None, {"type": "dp_adamw", "target_epsilon": None}).learning_rate == 1e-4


@pytest.mark.parametrize(
    ("sent", "named"),
    [
        ({"type": "dp_adamw", "learning_rate": 1e-3, "noise_multiplier": 0.1}, "noise_multiplier"),
        ({"type": "dp_adamw", "max_grad_norm": 2.0}, "max_grad_norm"),
        ({"type": "dp_adamw", "clip": 2.0}, "max_grad_norm"),
        ({"type": "dp_adamw", "dataset_id": "another"}, "dataset_id"),
        ({"type": "dp_adamw", "apply_dp_noise": False}, "apply_dp_noise"),
        ({"type": "dp_adamw", "learning_rate": "1"}, "learning_rate"),
        ({"type": "dp_adamw", "learning_rate": -1.0}, "learning_rate"),
        ({"learning_rate": None}, "learning_rate"),  # what the SDK makes of infinity and NaN
        ({"type": "dp_adamw", "learning_rate": 1e-3, "weight_decay": None}, "weight_decay"),
        ({"type": "dimuon", "learning_rate": 1.0}, "dimuon"),
        ({"learning_rate": 1.0, "noise": 0}, "noise"),
    ],
)
def test_a_step_cannot_change_what_was_promised(sent: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named):
        step_params(made("tiny:dp-eps4"), None, sent)


def test_a_private_step_of_a_run_that_is_not_is_refused() -> None:
    with pytest.raises(DPUnsupportedError, match="not taken"):
        step_params(made(), None, {"type": "dp_adamw", "learning_rate": 1e-3})
    with pytest.raises(InvalidRequestError, match="one of them"):
        step_params(made(), {"learning_rate": 1.0}, {"type": "adamw"})

"""Unmodified recipes train privately: by a key whose owner set a policy, or by a suffix of the model's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cookbook.conftest import Cookbook, column
from tests.cookbook.test_recipes import CHAT_SL
from tests.support.hub_folders import CHAT
from tg_tinker import ServiceClient

BUDGET: dict[str, Any] = {
    "target_epsilon": 8.0,
    "target_delta": 1e-5,
    "noise_multiplier": "auto",
    "diagnostics": "owner",
}
SUPERVISED: dict[str, Any] = {"batch_size": 16, "lora_rank": 8, "learning_rate": 1e-3, "max_length": 256}


def epsilons(metrics: list[dict[str, Any]]) -> list[float]:
    """What was spent after each step, as the recipe's own metrics file has it."""
    spent = column(metrics, "privacy/epsilon")
    assert spent == sorted(spent)
    assert 0 < spent[0] < spent[-1] <= BUDGET["target_epsilon"]
    return spent


def test_sl_loop_with_a_key_that_is_bound_to_a_policy(cookbook: Cookbook, tmp_path: Path) -> None:
    key = cookbook.key("notes-clinic", dataset_id="notes", privacy_unit="datum", planned_steps=6, **BUDGET)
    metrics = cookbook.run("sl_loop", tmp_path / "log", key, model_name=CHAT, max_steps=6, save_every=0, **SUPERVISED)
    assert len(epsilons(metrics)) == 6
    assert cookbook.steps_in_ledger("notes-clinic", "notes") == 6


@pytest.mark.slow  # 35 s
def test_sl_loop_with_a_suffix_of_the_name(cookbook: Cookbook, tmp_path: Path) -> None:
    key = cookbook.key("suffix")
    model = f"{CHAT}:dp-eps8-steps4"
    metrics = cookbook.run(
        "sl_loop", tmp_path / "log", key, model_name=model, max_steps=4, save_every=0, **SUPERVISED
    )
    assert len(epsilons(metrics)) == 4
    (run,) = ServiceClient(api_key=key, base_url=cookbook.server.address).list_training_clients()
    assert cookbook.steps_in_ledger("suffix", run.id) == 4, "the run is its own dataset"


@pytest.mark.slow  # 25 s: two processes
def test_what_was_spent_stays_spent_when_a_killed_recipe_goes_on(cookbook: Cookbook, tmp_path: Path) -> None:
    terms = {"dataset_id": "talk", "privacy_unit": "datum", "planned_steps": 24, **BUDGET}
    options = {**CHAT_SL, "num_epochs": 2}
    cookbook.kill_after("chat_sl.train", tmp_path / "log", cookbook.key("talk-clinic", **terms), lines=3, **options)
    metrics = cookbook.run("chat_sl.train", tmp_path / "log", cookbook.key("talk-clinic", **terms), **options)
    spent = column(metrics, "privacy/epsilon")
    assert spent == sorted(spent), "a step that is taken again is paid for again"
    assert spent[-1] <= 8.0
    assert len(spent) <= cookbook.steps_in_ledger("talk-clinic", "talk") <= 24, "killed between a step and its line"


@pytest.mark.slow  # 40 s
def test_dpo_clips_pairs(cookbook: Cookbook, tmp_path: Path) -> None:
    key = cookbook.key(
        "pairs-clinic",
        dataset_id="pairs",
        privacy_unit="pair",
        unit_of="adjacent_pair",
        custom_loss="independent",  # the owner has read it: a mean over pairs, of which every batch has eight
        planned_steps=4,
        merge_units=True,
        **BUDGET,
    )
    metrics = cookbook.run(
        "preference.dpo.train",
        tmp_path / "log",
        key,
        model_name=CHAT,
        dataset="hhh",
        batch_size=8,
        max_steps=4,
        max_length=256,
        learning_rate=1e-3,
        behavior_if_log_dir_exists="delete",
    )
    assert len(column(metrics, "dpo_loss")) == 4
    spent = column(metrics, "privacy/epsilon:max")  # before each step: this recipe logs what its passes say
    assert spent[0] == 0
    assert spent == sorted(set(spent))
    assert spent[-1] < 8
    assert cookbook.steps_in_ledger("pairs-clinic", "pairs") == 4


@pytest.mark.slow  # 45 s
def test_rl_loop_clips_the_group_of_a_prompt(cookbook: Cookbook, tmp_path: Path) -> None:
    key = cookbook.key(
        "sums-clinic",
        dataset_id="sums",
        privacy_unit="group",
        unit_of="prompt",
        planned_steps=5,
        merge_units=True,
        **BUDGET,
    )
    metrics = cookbook.run(
        "rl_loop",
        tmp_path / "log",
        key,
        model_name=CHAT,
        batch_size=8,
        group_size=16,
        max_steps=5,
        max_tokens=16,
        lora_rank=8,
        learning_rate=1e-3,
        loss_fn="importance_sampling",
        save_every=0,
    )
    assert len(metrics) == 5
    assert cookbook.steps_in_ledger("sums-clinic", "sums") == len(epsilons(metrics))

"""Unmodified recipes of tinker-cookbook 0.6.1 learn on our server, with no network.

Every model can do what is asked of it within a few steps, from thousands of tokens, so what is asserted does not hang
on luck. Seconds are those of a quiet core, most of them imports.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from tests.cookbook.conftest import Cookbook, column
from tests.support.hub_folders import BASE, CHAT

RL = {"model_name": CHAT, "lora_rank": 8, "max_tokens": 16, "loss_fn": "importance_sampling", "learning_rate": 0.02}
FRESH = {"behavior_if_log_dir_exists": "delete"}


def test_sl_loop(cookbook: Cookbook, tmp_path: Path) -> None:
    metrics = cookbook.run(
        "sl_loop",
        tmp_path / "log",
        cookbook.key(),
        model_name=CHAT,
        batch_size=16,
        max_steps=8,
        lora_rank=8,
        learning_rate=0.02,
        max_length=256,
        save_every=4,
    )
    nll = column(metrics, "train_mean_nll")
    assert len(nll) == 8
    assert nll[-1] < 0.8 * nll[0]


@pytest.mark.slow  # 40 s
def test_sl_basic(cookbook: Cookbook, tmp_path: Path) -> None:
    metrics = cookbook.run(
        "sl_basic", tmp_path / "log", cookbook.key(), model_name=CHAT, lora_rank=8, learning_rate=0.02, num_epochs=6
    )
    nll = column(metrics, "train_mean_nll")
    assert len(nll) == 6, "128 of 160 records in each epoch"
    assert nll[-1] < 0.8 * nll[0]
    assert column(metrics, "test/nll"), "the evaluator's forward passes"


@pytest.mark.slow  # 75 s: two processes
def test_chat_sl_goes_on_where_it_stopped(cookbook: Cookbook, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "model_name": CHAT,
        "dataset": "conversations.jsonl",
        "batch_size": 16,
        "lora_rank": 8,
        "learning_rate": 0.02,
        "lr_schedule": "constant",
        "max_length": 256,
        "save_every": 2,
        "rolling_save_every": 1,
        "eval_every": 0,
        "behavior_if_log_dir_exists": "resume",
    }
    first = cookbook.run("chat_sl.train", tmp_path / "log", cookbook.key(), max_steps=4, **options)
    assert column(first, "step") == [0, 1, 2, 3]
    # As after a crash: the last entry, which says that training is over, was not written yet.
    checkpoints = tmp_path / "log" / "checkpoints.jsonl"
    lines = checkpoints.read_text().splitlines()
    checkpoints.write_text("".join(line + "\n" for line in lines if '"final"' not in line))
    both = cookbook.run("chat_sl.train", tmp_path / "log", cookbook.key(), max_steps=8, **options)
    assert max(column(both, "step")) == 7
    nll = column(both, "train_mean_nll")
    assert nll[-1] < 0.8 * nll[0]
    went_on = [line for line in both[len(first) :] if "train_mean_nll" in line]
    assert went_on[0]["step"] > 0
    assert went_on[0]["train_mean_nll"] < 0.95 * nll[0], "it went on from trained weights"


@pytest.mark.slow  # 45 s
def test_rl_loop(cookbook: Cookbook, tmp_path: Path) -> None:
    metrics = cookbook.run(
        "rl_loop", tmp_path / "log", cookbook.key(), batch_size=8, group_size=16, max_steps=8, save_every=0, **RL
    )
    rewards = column(metrics, "reward/total")
    assert len(rewards) == 8
    assert fmean(rewards[-2:]) > fmean(rewards[:2]) + 0.2, "it learns the answer to every made-up sum"


@pytest.mark.slow  # 45 s
def test_dpo(cookbook: Cookbook, tmp_path: Path) -> None:
    metrics = cookbook.run(
        "preference.dpo.train",
        tmp_path / "log",
        cookbook.key(),
        model_name=CHAT,
        dataset="hhh",
        batch_size=8,
        max_steps=6,
        max_length=256,
        learning_rate=0.01,
        lr_schedule="constant",
        **FRESH,
    )
    loss = column(metrics, "dpo_loss")
    assert len(loss) == 6
    assert loss[0] == pytest.approx(0.6931, abs=1e-3), "the policy is the reference at first"
    assert loss[-1] < 0.5 * loss[0]


@pytest.mark.slow  # 50 s each
@pytest.mark.parametrize(
    ("loop", "options"),
    [
        ("sync", {}),
        ("async", {"max_steps_off_policy": 1, "loss_fn": "ppo"}),
        (
            "stream",
            {
                "stream_minibatch_config__groups_per_batch": 8,
                "stream_minibatch_config__num_minibatches": 2,
                "loss_fn": "cispo",
                "compute_post_kl": True,
            },
        ),
    ],
)
def test_math_rl(cookbook: Cookbook, tmp_path: Path, loop: str, options: dict[str, Any]) -> None:
    settings = {**RL, "env": "arithmetic", "group_size": 16, "groups_per_batch": 8, "max_steps": 8, "eval_every": 0}
    metrics = cookbook.run("math_rl.train", tmp_path / "log", cookbook.key(), **{**settings, **options}, **FRESH)
    rewards = column(metrics, "env/all/reward/total")
    assert len(rewards) >= 8
    assert fmean(rewards[-2:]) > fmean(rewards[:2]) + 0.02, f"{loop}: it learns to end its answer, worth 0.1"


@pytest.mark.slow  # 50 s
def test_on_policy_distillation(cookbook: Cookbook, tmp_path: Path) -> None:
    metrics = cookbook.run(
        "distillation.on_policy_distillation",
        tmp_path / "log",
        cookbook.key(),
        model_name=BASE,
        teacher_model=CHAT,
        dataset="deepmath",
        group_size=4,
        groups_per_batch=8,
        max_tokens=16,
        max_steps=8,
        lora_rank=8,
        learning_rate=0.02,
        eval_every=0,
        **FRESH,
    )
    kl = column(metrics, "teacher_kl")
    assert len(kl) == 8
    assert fmean(kl[-2:]) < 0.8 * kl[0]

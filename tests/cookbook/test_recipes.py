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
from tests.cookbook.exact_kl import last_adapter, reverse_kl
from tests.support.hub_folders import BASE, CHAT, TEACHER, THINGS

RL = {"model_name": CHAT, "lora_rank": 8, "max_tokens": 16, "loss_fn": "importance_sampling", "learning_rate": 0.02}
CHAT_SL: dict[str, Any] = {
    "model_name": CHAT,
    "dataset": "conversations.jsonl",
    "batch_size": 16,
    "num_epochs": 4,
    "lora_rank": 8,
    "learning_rate": 0.02,
    "lr_schedule": "constant",
    "max_length": 256,
    "save_every": 2,
    "rolling_save_every": 1,
    "eval_every": 0,
    "behavior_if_log_dir_exists": "resume",
}
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


@pytest.mark.slow  # 30 s: two processes
def test_chat_sl_goes_on_after_it_was_killed(cookbook: Cookbook, tmp_path: Path) -> None:
    steps, options = 40, CHAT_SL  # ten batches in each of four epochs
    cookbook.kill_after("chat_sl.train", tmp_path / "log", cookbook.key(), lines=6, **options)
    before = column(cookbook.metrics(tmp_path / "log"), "step")
    metrics = cookbook.run("chat_sl.train", tmp_path / "log", cookbook.key(), **options)
    after = column(metrics, "step")[len(before) :]
    assert 6 <= len(before) < steps
    assert 0 < after[0] <= before[-1] + 1, "from its last checkpoint, not from the beginning"
    assert after == [after[0] + i for i in range(steps - int(after[0]))]
    nll = column(metrics, "train_mean_nll")
    assert nll[len(before)] < nll[0], "with the weights that it had"
    assert nll[-1] < 0.8 * nll[0]


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
                "compute_post_kl": True,  # scores every sample again: twice the requests, so fewer steps
                "max_steps": 6,
            },
        ),
    ],
)
def test_math_rl(cookbook: Cookbook, tmp_path: Path, loop: str, options: dict[str, Any]) -> None:
    settings = {**RL, "env": "arithmetic", "group_size": 16, "groups_per_batch": 8, "max_steps": 8, "eval_every": 0}
    settings |= options
    metrics = cookbook.run("math_rl.train", tmp_path / "log", cookbook.key(), **settings, **FRESH)
    rewards = column(metrics, "env/all/reward/total")
    assert len(rewards) >= settings["max_steps"]
    assert fmean(rewards[-2:]) > fmean(rewards[:2]) + 0.02, f"{loop}: it learns to end its answer, worth 0.1"


@pytest.mark.slow  # 55 s
def test_on_policy_distillation(cookbook: Cookbook, tmp_path: Path) -> None:
    # Without a baseline a step is mostly noise: at four times this rate plain torch, too, now and then ends where it
    # began. At this one it comes down steadily, to less than a tenth after eight steps.
    key = cookbook.key()
    metrics = cookbook.run(
        "distillation.on_policy_distillation",
        tmp_path / "log",
        key,
        model_name=BASE,
        teacher_model=TEACHER,
        dataset="deepmath",
        group_size=4,
        groups_per_batch=8,
        max_tokens=16,
        max_steps=8,
        lora_rank=8,
        learning_rate=0.005,
        eval_every=0,
        **FRESH,
    )
    kl = column(metrics, "teacher_kl")
    assert len(kl) == 8
    adapter = last_adapter(tmp_path / "log", tmp_path / "adapter", **cookbook.credentials(key))
    texts = [f"User: Made-up sum {i}: how many {thing}?\n\nAssistant: {thing} abc" for i, thing in enumerate(THINGS)]
    student, teacher = cookbook.hub / BASE, cookbook.hub / TEACHER
    before, after = (reverse_kl(student, teacher, texts, adapter=a) for a in (None, adapter))
    print("teacher_kl:", *(f"{value:.2f}" for value in kl), f"exact: {before:.3f} before, {after:.3f} after")
    assert kl[0] == pytest.approx(before, abs=0.2), "512 sampled tokens, each with a deviation of 0.9"
    assert fmean(kl[-2:]) < 0.5 * kl[0]
    assert after < 0.3 * before

"""What every contender is: one optimizer step over given batches, and its weights to hold against the others'.

Shape suffixes: B records, T tokens, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import peft
import torch
from torch.nn import functional

from benchmarks.engine_peers.shapes import Batch, Shape, build_model, make_batches, vocabulary_of
from tg_tinker.types import IGNORE_INDEX

Weights = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a step is taken.

    Attributes:
        optimizer: AdamW where time is measured; SGD where the update itself is looked at.
        learning_rate: of every step.
        max_grad_norm: C, in gradient units of one record's mean loss.
        noise_multiplier: noise standard deviation divided by C; 0 draws none.
        device: "cpu" or "cuda".
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-4
    max_grad_norm: float = 1.0
    noise_multiplier: float = 1.0
    device: str = "cpu"


class Contender(Protocol):
    """One way to train the adapter, in memory and ready."""

    def step(self) -> None:
        """One optimizer step over the shape's micro-batches."""
        ...

    def weights(self) -> Weights:
        """The adapter now, under PEFT's own names without the adapter's."""
        ...


class PeftModel:
    """The shape's base model with a PEFT adapter of seeded weights, and its batches on the device."""

    def __init__(self, shape: Shape, recipe: Recipe) -> None:
        base = build_model(shape)
        targets = shape.targets if isinstance(shape.targets, str) else list(shape.targets)
        config = peft.LoraConfig(
            r=shape.rank, lora_alpha=2 * shape.rank, target_modules=targets, task_type="CAUSAL_LM"
        )
        self.model: Any = peft.get_peft_model(base, config).to(recipe.device).train()
        self.named: dict[str, torch.nn.Parameter] = {
            re.sub(r"\.default(?=\.|$)", "", name): parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        with torch.no_grad():
            for name, values in seeded_weights({n: tuple(p.shape) for n, p in self.named.items()}).items():
                self.named[name].copy_(torch.from_numpy(values))
        self.batches = [to_device(batch, recipe.device) for batch in make_batches(shape, vocabulary_of(shape, base))]

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained."""
        return list(self.named.values())

    def weights(self) -> Weights:
        """See ``Contender``."""
        return {name: p.detach().float().cpu().numpy().copy() for name, p in self.named.items()}


def seeded_weights(shapes: Mapping[str, tuple[int, ...]]) -> Weights:
    """Adapter weights that depend on names and shapes alone. Neither half is zero, as that would hide mistakes."""
    rng = np.random.default_rng(0)
    return {name: rng.normal(0, 0.02, shapes[name]).astype(np.float32) for name in sorted(shapes)}


def make_optimizer(parameters: Sequence[torch.nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """torch's own optimizer, as the engine under test configures it."""
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=recipe.learning_rate)
    return torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)


def to_device(batch: Batch, device: str) -> dict[str, torch.Tensor]:
    """Keyword arguments of a transformers model."""
    return {
        name: torch.from_numpy(getattr(batch, name)).to(device) for name in ("input_ids", "attention_mask", "labels")
    }


def record_losses(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each record over its own targets [B]: the loss that every private contender clips.

    As in transformers the labels are shifted, not the logits, whose copy would cost time and memory.
    """
    targets_BT = functional.pad(labels_BT, (0, 1), value=IGNORE_INDEX)[:, 1:]
    losses = functional.cross_entropy(
        logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return losses.view(targets_BT.shape).sum(dim=1) / (targets_BT != IGNORE_INDEX).sum(dim=1).clamp(min=1)

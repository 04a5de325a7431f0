"""Runs that differ: trained a little, each on random tokens of its own."""

from __future__ import annotations

import numpy as np

from tg_tinker import TrainingClient
from tg_tinker.types.datum import Datum, ModelInput
from tg_tinker.types.optim import AdamParams


def datum(tokens: list[int]) -> Datum:
    """A text of which every token but the first is a target."""
    weights = np.ones(len(tokens) - 1, dtype=np.float32)
    return Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], "weights": weights})


def train(client: TrainingClient, seed: int, steps: int = 2) -> None:
    """A few steps on four random texts."""
    for _ in range(steps):
        texts = np.random.default_rng(seed).integers(0, 300, (4, 20)).tolist()
        client.forward_backward([datum(t) for t in texts], "cross_entropy").result()
        client.optim_step(AdamParams(learning_rate=0.02)).result()

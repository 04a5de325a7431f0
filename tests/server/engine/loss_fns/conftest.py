"""Random datums, and custom losses as the public API writes them down."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tg_tinker.custom.trace import trace_loss
from tg_tinker.types.losses import Loss
from tg_tinker_server.engine.backend import LossRequest

LENGTHS = (5, 1, 9, 3, 7, 4)


def datums(name, lengths=LENGTHS, *, alternatives=None, seed=0):
    """Random datums, of which some positions are masked."""
    tokens, inputs = [], []
    for i, n in enumerate(lengths):
        rng = np.random.default_rng([seed, i])
        shape = (n,) if alternatives is None else (n, alternatives)
        tokens.append(rng.integers(0, 256, n))
        given = {"target_tokens": rng.integers(0, 256, shape)}
        keep = rng.random(shape) < 0.8
        if name == "cross_entropy":
            given["weights"] = (keep * rng.normal(size=shape)).astype(np.float32)
        else:
            given["advantages"] = (keep * rng.normal(size=shape)).astype(np.float32)
            given["logprobs"] = (-5.5 + rng.normal(size=shape)).astype(np.float32)
        inputs.append(given)
    return tuple(tokens), tuple(inputs)


def request(name, lengths=LENGTHS, *, config=None, alternatives=None, of=0, index=None, **options):
    """A request on random datums, others for each ``of``; ``index`` takes some of them.

    "custom" is ``policy_loss`` as a graph.
    """
    tokens, inputs = datums(name, lengths, alternatives=alternatives, seed=of)
    if index is not None:
        tokens, inputs = tuple(tokens[i] for i in index), tuple(inputs[i] for i in index)
    if name == "custom":
        config, options = {"loss_id": "x"}, {"graph": encoded(policy_loss)} | options
        inputs = tuple({"old" if k == "logprobs" else k: v for k, v in given.items()} for given in inputs)
    return LossRequest(tokens=tokens, inputs=inputs, loss=Loss.of(name, config), **options)


def policy_loss(logprobs, old, advantages):
    """PPO without its masks, with two metrics."""
    ratio = torch.exp(logprobs - old)
    gain = torch.minimum(ratio * advantages, torch.clamp(ratio, 0.8, 1.2) * advantages)
    metrics = {"custom/kl:mean": (old - logprobs).mean(), "custom/tokens:sum": (advantages != 0).float().sum()}
    return -gain.sum(), metrics


def encoded(function, **ranks):
    """A function as the JSON that a client sends; every input has one dimension unless said."""
    names = inspect.signature(function).parameters
    return trace_loss(function, {name: ranks.get(name, 1) for name in names}).graph_json


@pytest.fixture(scope="session")
def data():
    """Helpers of this folder, by name."""
    return SimpleNamespace(lengths=LENGTHS, datums=datums, request=request, encoded=encoded, policy_loss=policy_loss)

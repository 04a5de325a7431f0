"""Losses as formulas of torch, differentiated by it. See ``types.losses`` for what each is.

Shape suffixes: N positions, K alternatives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tg_tinker.types.losses import CUSTOM, Loss
from tg_tinker_server.engine.loss_fns.graph import compiled
from tg_tinker_server.engine.loss_fns.values import DatumLoss, Inputs

Tensors = Mapping[str, torch.Tensor]


def evaluate(loss: Loss, logprobs: npt.NDArray[Any], inputs: Inputs, *, train: bool, graph: str = "") -> DatumLoss:
    """The loss of one datum, with its derivative in training.

    Args:
        loss: which.
        logprobs: of the targets, [N] or [N, K].
        inputs: checked against the loss.
        train: whether the derivative is wanted.
        graph: of a custom loss.
    """
    if loss.name == CUSTOM:
        return compiled(graph).evaluate(logprobs, inputs, train=train)
    lp = torch.from_numpy(logprobs.astype(np.float64)).requires_grad_(train)
    with torch.set_grad_enabled(train):
        value = loss_of(loss, lp, {name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in inputs.items()})
    slope = torch.autograd.grad(value, lp)[0].numpy() if train else None
    return DatumLoss(value=value.item(), slope=slope)


def loss_of(loss: Loss, logprobs: torch.Tensor, inputs: Tensors) -> torch.Tensor:
    """The loss of one datum, a scalar, differentiable in ``logprobs``.

    A position whose weight or advantage is zero is left out: it adds nothing, whatever its log-probability is, nor
    does the penalty of ``dro`` reach it.
    """
    if loss.name == "cross_entropy":
        weights = inputs["weights"].double()
        counts = weights != 0
        return -(logprobs[counts] * weights[counts]).sum()
    advantages = inputs["advantages"].double()
    counts = advantages != 0
    lp, q, gain = logprobs[counts], inputs["logprobs"].double()[counts], advantages[counts]
    if loss.name == "importance_sampling":
        return -(torch.exp(lp - q) * gain).sum()
    if loss.name == "dro":
        return -(lp * gain - 0.5 * loss.config["beta"] * (lp - q) ** 2).sum()
    low, high = (
        inputs[name].double()[counts] if name in inputs else torch.full_like(gain, loss.config[name])
        for name in ("clip_low_threshold", "clip_high_threshold")
    )
    if loss.name == "cispo":
        return -(torch.exp(lp - q).clamp(low, high).detach() * lp * gain).sum()
    if loss.name == "ppo":
        ratio = torch.exp(lp - q)
    elif loss.name == "gspo":
        # Every token has the value of the sequence's ratio and the gradient of its own log-probability.
        ratio = torch.exp(_sequence_log_ratio(logprobs.detach(), inputs) + lp - lp.detach())
    else:
        raise AssertionError(loss.name)
    return -torch.minimum(ratio * gain, ratio.clamp(low, high) * gain).sum()


def _sequence_log_ratio(logprobs: torch.Tensor, inputs: Tensors) -> torch.Tensor:
    """Mean of lp - q over the mask, or over the tokens with an advantage; 0 where it marks nothing."""
    marked = inputs.get("sequence_ratio_mask", inputs["advantages"]) != 0
    return (logprobs - inputs["logprobs"].double())[marked].mean() if marked.any() else logprobs.new_zeros(())

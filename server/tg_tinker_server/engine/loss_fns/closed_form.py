"""Losses and their derivatives written out by hand, in NumPy float64.

The second answer beside ``autograd.py``, which has the same losses as torch's formulas. See ``types.losses`` for
what each is.

Shape suffixes: N positions, K alternatives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tg_tinker.types.losses import Loss
from tg_tinker_server.engine.loss_fns.values import DatumLoss, Inputs

Floats = npt.NDArray[np.float64]


def evaluate(loss: Loss, logprobs: npt.NDArray[Any], inputs: Inputs, *, train: bool) -> DatumLoss:
    """The loss of one datum, with its derivative in training.

    A position whose weight or advantage is zero contributes exactly zero to both, whatever its log-probability is.

    Args:
        loss: any but a custom one.
        logprobs: of the targets, [N], or [N, K] for ``cross_entropy``.
        inputs: checked against the loss.
        train: whether the derivative is wanted.
    """
    of_each = inputs["weights" if loss.name == "cross_entropy" else "advantages"].astype(np.float64)
    counts = of_each != 0
    own = {
        name: np.asarray(value, dtype=np.float64)[counts]
        for name, value in inputs.items()
        if name in ("weights", "advantages", "logprobs", "clip_low_threshold", "clip_high_threshold")
        and value.shape == logprobs.shape
    }
    lp = logprobs.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite shows in the result
        if loss.name == "gspo":
            own["log_ratio"] = np.full(int(counts.sum()), _sequence_log_ratio(lp, inputs))
        values, slopes = _FORMULAS[loss.name](lp[counts], own, loss.config)
        value = float(np.sum(values))
    if not train:
        return DatumLoss(value=value, slope=None)
    slope = np.zeros(lp.shape)
    slope[counts] = slopes
    return DatumLoss(value=value, slope=slope)


Config = Mapping[str, float]


def _cross_entropy(lp: Floats, own: dict[str, Floats], config: Config) -> tuple[Floats, Floats]:  # noqa: ARG001
    return -own["weights"] * lp, -own["weights"]


def _importance_sampling(lp: Floats, own: dict[str, Floats], config: Config) -> tuple[Floats, Floats]:  # noqa: ARG001
    gain = np.exp(lp - own["logprobs"]) * own["advantages"]
    return -gain, -gain


def _ppo(lp: Floats, own: dict[str, Floats], config: Config) -> tuple[Floats, Floats]:
    return _clipped_gain(np.exp(lp - own["logprobs"]), own, config)


def _gspo(lp: Floats, own: dict[str, Floats], config: Config) -> tuple[Floats, Floats]:  # noqa: ARG001
    return _clipped_gain(np.exp(own["log_ratio"]), own, config)


def _clipped_gain(ratio: Floats, own: dict[str, Floats], config: Config) -> tuple[Floats, Floats]:
    """The lesser of both gains; where it is the clipped one, out of range, nothing changes with the ratio."""
    low, high = _thresholds(own, config)
    gain, clipped = ratio * own["advantages"], np.clip(ratio, low, high) * own["advantages"]
    return -np.minimum(gain, clipped), np.where(gain > clipped, 0.0, -gain)


def _cispo(lp: Floats, own: dict[str, Floats], config: Config) -> tuple[Floats, Floats]:
    low, high = _thresholds(own, config)
    slope = -np.clip(np.exp(lp - own["logprobs"]), low, high) * own["advantages"]
    return slope * lp, slope


def _dro(lp: Floats, own: dict[str, Floats], config: Config) -> tuple[Floats, Floats]:
    beta, distance = config["beta"], lp - own["logprobs"]
    return -(lp * own["advantages"] - 0.5 * beta * distance**2), -(own["advantages"] - beta * distance)


def _thresholds(own: dict[str, Floats], config: Config) -> tuple[Any, Any]:
    """Of each position where given, else those of the configuration."""
    names = ("clip_low_threshold", "clip_high_threshold")
    low, high = (own.get(name, config[name]) for name in names)
    return low, high


def _sequence_log_ratio(lp: Floats, inputs: Inputs) -> float:
    """Mean of lp - q over the mask; 0 where it marks nothing."""
    mask = inputs.get("sequence_ratio_mask", inputs["advantages"]) != 0
    return float(np.mean(lp[mask] - inputs["logprobs"][mask].astype(np.float64))) if mask.any() else 0.0


_FORMULAS = {
    "cross_entropy": _cross_entropy,
    "importance_sampling": _importance_sampling,
    "ppo": _ppo,
    "cispo": _cispo,
    "dro": _dro,
    "gspo": _gspo,
}

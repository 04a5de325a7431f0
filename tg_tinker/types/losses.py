"""The losses a server offers: what each takes, and what it couples. Checked on both sides.

All are sums over positions and datums. With lp the log-probability of the target, w the weights, q the sampler's
log-probability, A the advantage, r = exp(lp - q):

    cross_entropy         -w lp
    importance_sampling   -r A
    ppo                   -min(r A, clip(r, low, high) A)              Schulman et al. 2017
    cispo                 -stop_gradient(clip(r, low, high)) lp A      MiniMax-M1 2025
    dro                   -(lp A - beta/2 (lp - q)^2)                  Richemond et al. 2024
    gspo                  as ppo, with one r = exp(mean over the mask of lp - q) for a sequence   Zheng et al. 2025
    custom                a graph made by ``create_custom_loss``, run once for each datum
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types.datum import Datum

Coupling = Literal["independent", "group"]
CUSTOM = "custom"
_RATIO = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
_RL = ("target_tokens", "logprobs", "advantages")
_CLIPS = ("clip_low_threshold", "clip_high_threshold")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossKind:
    """One loss.

    Attributes:
        required: inputs of every datum; ``target_tokens`` is int64 [N] or, where ``alternatives``, [N, K].
        optional: inputs that may be there, one value for each position.
        config: names in ``loss_fn_config`` and their defaults.
        coupling: "group": the inputs of a datum are usually computed from a whole group of datums, as advantages are
            that were centred over it. Under differential privacy the group is then the smallest privacy unit.
        alternatives: whether [N, K] is possible.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    config: Mapping[str, float] = field(default_factory=dict)
    coupling: Coupling = "independent"
    alternatives: bool = False


LOSSES: dict[str, LossKind] = {
    "cross_entropy": LossKind(required=("target_tokens", "weights"), alternatives=True),
    "importance_sampling": LossKind(required=_RL, coupling="group"),
    "ppo": LossKind(required=_RL, optional=_CLIPS, config=_RATIO, coupling="group"),
    "cispo": LossKind(required=_RL, optional=_CLIPS, config=_RATIO, coupling="group"),
    "dro": LossKind(required=_RL, config={"beta": 0.05}, coupling="group"),
    "gspo": LossKind(required=_RL, optional=(*_CLIPS, "sequence_ratio_mask"), config=_RATIO, coupling="group"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """A loss and its settings.

    Attributes:
        name: of ``LOSSES``, or "custom".
        config: checked, defaults filled in.
        loss_id: of a custom loss that the server knows.
    """

    name: str
    config: Mapping[str, float] = field(default_factory=dict)
    loss_id: str = ""

    @classmethod
    def of(cls, name: str, config: Mapping[str, float | str] | None = None) -> Loss:
        """Check name and settings.

        Raises:
            InvalidRequestError: an unknown loss or setting, or one that cannot be.
        """
        given = dict(config or {})
        if name == CUSTOM:
            loss_id = given.pop("loss_id", "")
            if not isinstance(loss_id, str) or not loss_id or given:
                raise _config("a custom loss takes loss_id, as create_custom_loss returned it, and nothing else")
            return cls(name=name, loss_id=loss_id)
        kind = LOSSES.get(name)
        if kind is None:
            raise InvalidRequestError(
                f"loss_fn {name!r} is not offered; offered: {', '.join([*LOSSES, CUSTOM])}",
                field="loss_fn",
                constraint="one of: " + ", ".join([*LOSSES, CUSTOM]),
            )
        unknown = sorted(set(given) - set(kind.config))
        if unknown:
            known = ", ".join(kind.config) or "none"
            raise _config(f"{name} has no setting {', '.join(map(repr, unknown))}; it takes: {known}")
        values = dict(kind.config)
        for key, value in given.items():
            if isinstance(value, bool | str) or not math.isfinite(value):
                raise _config(f"{key}={value!r} is not a finite number")
            values[key] = float(value)
        low, high = values.get("clip_low_threshold", 0.0), values.get("clip_high_threshold", 1.0)
        if low > high or low < 0:
            raise _config(f"the ratio cannot be clipped to {low} .. {high}")
        if values.get("beta", 0.0) < 0:
            raise _config("beta is negative")
        return cls(name=name, config=values)


def check_data(loss: Loss, data: Sequence[Datum]) -> None:
    """Refuse datums that a loss cannot be computed on. Extra inputs are ignored.

    Raises:
        InvalidRequestError: naming the input.
    """
    kind = LOSSES.get(loss.name, LossKind(required=("target_tokens",)))
    for datum in data:
        length = datum.model_input.length
        for name in kind.required:
            if name not in datum.loss_fn_inputs:
                raise InvalidRequestError(
                    f"{loss.name} needs loss_fn_inputs[{name!r}], one value for each position",
                    field=f"loss_fn_inputs.{name}",
                    constraint="present",
                )
        targets = datum.loss_fn_inputs["target_tokens"]
        dimensions = (1, 2) if kind.alternatives else (1,)
        if targets.dtype != "int64" or len(targets.shape) not in dimensions or targets.shape[0] != length:
            raise InvalidRequestError(
                f"target_tokens are {targets.dtype} {targets.shape} for {length} tokens of model_input; "
                + ("they are int64 [N] or [N, K]" if kind.alternatives else "they are int64 [N]"),
                field="loss_fn_inputs.target_tokens",
                constraint="one row for each token of model_input",
            )
        for name in (*kind.required[1:], *(n for n in kind.optional if n in datum.loss_fn_inputs)):
            found = datum.loss_fn_inputs[name]
            if found.shape != targets.shape:
                raise InvalidRequestError(
                    f"{name} has the shape {found.shape}, target_tokens {targets.shape}",
                    field=f"loss_fn_inputs.{name}",
                    constraint="same shape as target_tokens",
                )


def _config(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, field="loss_fn_config", constraint="settings of the loss, finite")


__all__ = ["CUSTOM", "LOSSES", "Loss", "LossKind", "check_data"]

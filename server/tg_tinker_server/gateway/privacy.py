"""The configuration of a run that was asked for in the Tinker protocol, and what was asked about its privacy.

Two ways in: a suffix of the model's name, which scripts need not be changed for, and the optimizer type ``dp_adamw``.
Both are requests: on a key with a policy ``KeyPolicy.apply`` has the last word, and plain AdamW trains privately too.
What cannot be understood is refused, so that nobody trains without the privacy that they asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from pydantic import ValidationError

from tg_tinker.errors import DPUnsupportedError, InvalidRequestError
from tg_tinker.types import DPConfig, LoRAConfig, OptimizerConfig, TrainingConfig
from tg_tinker.types.optim import AdamParams
from tg_tinker_server.service.caller import Caller

PLANNED_STEPS = 200
"""Steps that the noise is solved for where neither the noise nor a number of steps is given."""
ALPHA = 32.0
"""Of every adapter: the protocol leaves it to the server."""
MAX_TOKENS = 1 << 20
"""No limit of our own on a sequence: the model's is smaller."""
DP_ADAMW = "dp_adamw"
_OPTIMIZERS = ("adamw", DP_ADAMW)
_GROUPS = (("train_attn", "@attention"), ("train_mlp", "@mlp"), ("train_unembed", "@unembed"))
_SUFFIX = ":dp-eps<epsilon>[-delta<d>][-clip<c>][-steps<n>][-noise<s>], such as :dp-eps4-delta1e-6-clip0.5-steps200"
_PART = re.compile(r"-(eps|delta|clip|steps|noise)(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", re.IGNORECASE)
_COUPLED_UNITS = ("group", "pair", "user", "site")


@dataclass(frozen=True, slots=True, kw_only=True)
class DPRequest:
    """What a caller asked for; ``None``: nothing was said. The names are those of ``DPConfig``.

    Attributes:
        planned_steps: after which the run is complete, and which the noise is solved for.
    """

    target_epsilon: float | None = None
    target_delta: float | None = None
    max_grad_norm: float | None = None
    noise_multiplier: float | None = None
    planned_steps: int | None = None
    dataset_id: str | None = None
    dataset_size: int | None = None
    privacy_unit: str | None = None
    sampling: str | None = None
    max_participation: int | None = None
    diagnostics: str | None = None
    merge_units: bool | None = None
    initial_weights: str | None = None
    custom_loss: str | None = None

    def given(self) -> dict[str, Any]:
        """What was said, without ``planned_steps``, which is no part of a ``DPConfig``."""
        return {k: v for k, v in asdict(self).items() if v is not None and k != "planned_steps"}


_ALIASES = {"delta": "target_delta", "epsilon": "target_epsilon", "clip": "max_grad_norm", "steps": "planned_steps"}
_FIELDS = tuple(f.name for f in fields(DPRequest))
_FIXED = ("target_epsilon", "target_delta", "max_grad_norm", "noise_multiplier", "dataset_id", "privacy_unit")
_ADAM = ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm")


def model_and_request(base_model: str) -> tuple[str, DPRequest | None]:
    """Take a privacy suffix off a model's name.

    >>> name, asked = model_and_request("Qwen/Qwen3-8B:dp-eps4-steps100")
    >>> name, asked.target_epsilon, asked.planned_steps
    ('Qwen/Qwen3-8B', 4.0, 100)

    Raises:
        InvalidRequestError: a suffix that begins as one for privacy and cannot be read.
    """
    name, *suffixes = base_model.split(":")
    private = [s for s in suffixes if s.strip().lower().startswith("dp")]
    if not private:
        return base_model, None
    if not name or len(private) > 1 or suffixes[-1] is not private[0]:
        raise _bad_suffix(base_model, "it stands once, at the end, after the model's name")
    text = private[0]
    parts = list(_PART.finditer(text))
    if text[:2] != "dp" or text[2:] != "".join(p.group() for p in parts) or not parts:
        raise _bad_suffix(base_model, "it does not read as one")
    values: dict[str, str] = {}
    for part in parts:
        key = part[1].lower()
        if key in values:
            raise _bad_suffix(base_model, f"{key} is given twice")
        values[key] = part[2]
    if "eps" not in values:
        raise _bad_suffix(base_model, "it has no eps, the epsilon that must not be exceeded")
    steps = values.get("steps")
    if steps is not None and not steps.isdecimal():
        raise _bad_suffix(base_model, f"steps{steps} is not a whole number")
    return ":".join([name, *suffixes[:-1]]), DPRequest(
        target_epsilon=_positive(base_model, "eps", values),
        target_delta=_positive(base_model, "delta", values),
        max_grad_norm=_positive(base_model, "clip", values),
        noise_multiplier=_positive(base_model, "noise", values),
        planned_steps=_count("steps", steps),
    )


def training_config(
    *,
    base_model: str,
    lora: Mapping[str, Any] | None,
    optimizer: Mapping[str, Any] | None,
    metadata: Mapping[str, Any] | None,
    caller: Caller,
) -> TrainingConfig:
    """The configuration of a run, as ``create_model`` asks for it.

    Args:
        lora: rank, seed, train_attn, train_mlp, train_unembed.
        optimizer: its ``type`` and what belongs to it; ``None`` is adamw.
        caller: whose policy, if there is one, has the last word on everything that concerns privacy.

    Losses of the protocol are sums, so gradients are divided by one.

    Raises:
        InvalidRequestError: naming what cannot be read or is looser than the policy.
        DPUnsupportedError: naming what has no privacy on this door, and the alternative.
    """
    name, by_name = model_and_request(base_model)
    asked = _together(by_name, _of_optimizer(optimizer))
    adapter, seed = _adapter(lora or {})
    policy = caller.policy
    dp: dict[str, Any] | None = None
    max_steps: int | None = None
    if asked is not None:
        dp, max_steps = asked.given(), asked.planned_steps
        if policy is None:
            dp, max_steps = _complete(asked)
    config: TrainingConfig = _born(
        TrainingConfig,
        model_ref=name,
        lora_config=adapter,
        optimizer=OptimizerConfig(name="adamw", betas=(0.9, 0.95), eps=1e-12),
        dp_config=None if dp is None else _born(DPConfig, **dp),
        batch_size=1,
        max_sequence_length=MAX_TOKENS,
        max_steps=max_steps,
        seed=seed,
        metadata=dict(metadata or {}),
    )
    if policy is not None:
        config = policy.apply(config)
    return config


def step_params(
    config: TrainingConfig, adam: Mapping[str, Any] | None, optimizer: Mapping[str, Any] | None
) -> AdamParams:
    """The settings of one ``optim_step``: ``adam_params``, or ``optimizer_params`` with a type.

    Whatever is sent, a private run takes a private step: these are the settings of Adam after the noise.

    Raises:
        InvalidRequestError: an unknown type or field; or a field of privacy that differs from the run's, which is
            fixed when the run is made.
        DPUnsupportedError: ``dp_adamw`` for a run without privacy.
    """
    if adam is not None and optimizer is not None:
        raise _refuse("optim_step has adam_params and optimizer_params; send one of them", "optimizer_params", "one")
    given = dict(adam if adam is not None else optimizer or {})
    kind = given.pop("type", None) or "adamw"
    if kind not in _OPTIMIZERS:
        raise _unknown_type(kind)
    settings = {k: given.pop(k) for k in _ADAM if k in given}
    given = {_ALIASES.get(k, k): v for k, v in given.items() if v is not None}
    if kind == DP_ADAMW:
        dp = config.dp_config
        if dp is None or not config.private:
            raise DPUnsupportedError(
                "a dp_adamw step was asked of a run without differential privacy; it was not taken",
                feature="dp_adamw",
                reason="clipping and noise belong to a run from its beginning, or its earlier steps would leak",
                alternative="create the model with optimizer type dp_adamw, or with a name such as <model>:dp-eps8",
            )
        for key in _FIXED:
            value = given.pop(key, None)
            if value is not None and value != getattr(dp, key) and not _same(value, getattr(dp, key)):
                raise _refuse(
                    f"{key}={value!r} differs from the run's {getattr(dp, key)!r}, which is fixed when the model is "
                    "created; leave it out here",
                    f"optimizer_params.{key}",
                    "as at creation",
                )
    if given:
        raise _unknown_fields(f"optim_step with {kind}", given, _ADAM)
    for key, value in settings.items():
        if value is None:  # no default: the step would be charged at a rate that nobody chose
            raise _refuse(
                f"{key} is null, which is how clients write infinity and NaN; send a number, or leave it out",
                f"adam_params.{key}",
                "a finite number",
            )
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _refuse(f"{key}={value!r} is not a number", f"adam_params.{key}", "a number")
    return AdamParams(**{k: float(v) for k, v in settings.items()})


def _of_optimizer(optimizer: Mapping[str, Any] | None) -> DPRequest | None:
    given = {k: v for k, v in (optimizer or {}).items() if v is not None}
    kind = given.pop("type", "adamw")
    if kind not in _OPTIMIZERS:
        raise _unknown_type(kind)
    if kind != DP_ADAMW:
        if given:
            raise _unknown_fields(f"optimizer type {kind!r}", given, ())
        return None
    named: dict[str, Any] = {}
    for key, value in given.items():
        field = _ALIASES.get(key, key)
        if field in named:
            raise _refuse(f"{DP_ADAMW} gives {field} twice", f"optimizer_config.{key}", "once")
        named[field] = value
    unknown = {k: v for k, v in named.items() if k not in _FIELDS}
    if unknown:
        raise _unknown_fields(f"optimizer type {DP_ADAMW!r}", unknown, (*_FIELDS, *_ALIASES))
    if named.get("sampling") == "poisson":
        raise DPUnsupportedError(
            "sampling='poisson' is not offered to Tinker clients: they choose their batches themselves",
            feature="sampling",
            reason="amplification holds only for batches that were drawn at the declared rate",
            alternative="sampling='none' or 'max_participation'; or a run of tg_tinker on a registered dataset, from "
            "which the server draws",
        )
    if named.get("noise_multiplier") == "auto":
        del named["noise_multiplier"]  # left out, it is solved for
    named["planned_steps"] = _count("planned_steps", named.get("planned_steps"))
    for key in ("target_epsilon", "target_delta", "max_grad_norm", "noise_multiplier"):
        value = named.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise _refuse(f"{key}={value!r} is not a number", f"optimizer_config.{key}", "a number")
        if value is not None and not (math.isfinite(value) and value > 0):
            raise _refuse(f"{key}={value!r} is not above 0 and finite", f"optimizer_config.{key}", "above 0, finite")
    return DPRequest(**named)


def _together(by_name: DPRequest | None, by_optimizer: DPRequest | None) -> DPRequest | None:
    if by_name is None or by_optimizer is None:
        return by_name or by_optimizer
    merged = {}
    for field in _FIELDS:
        one, other = getattr(by_name, field), getattr(by_optimizer, field)
        if one is not None and other is not None and not _same(one, other):
            raise _refuse(
                f"the model's name asks for {field} {one}, the optimizer for {other}; say it once",
                f"optimizer_config.{field}",
                "as in the model's name",
            )
        merged[field] = other if one is None else one
    return DPRequest(**merged)


def _complete(asked: DPRequest) -> tuple[dict[str, Any], int | None]:
    """Nobody's policy fills in what is missing."""
    if asked.target_epsilon is None:
        raise _refuse(
            f"{DP_ADAMW} needs target_epsilon, the epsilon that must not be exceeded",
            "optimizer_config.target_epsilon",
            "above 0",
        )
    dp, steps = asked.given(), asked.planned_steps
    if asked.noise_multiplier is None:
        dp["noise_multiplier"] = "auto"
        steps = steps or PLANNED_STEPS
    if asked.merge_units is None and asked.privacy_unit in _COUPLED_UNITS:
        # A client cuts its batches where it likes, so a group may come in two calls.
        dp["merge_units"] = True
    return dp, steps


def _adapter(lora: Mapping[str, Any]) -> tuple[LoRAConfig, int | None]:
    targets = [group for flag, group in _GROUPS if lora.get(flag) is not False]
    if not targets:
        raise _refuse(
            "train_attn, train_mlp and train_unembed are all false, so nothing would be trained; set one",
            "lora_config",
            "at least one group of layers",
        )
    rank = 32 if lora.get("rank") is None else lora["rank"]
    return _born(LoRAConfig, rank=rank, alpha=ALPHA, target_modules=targets), lora.get("seed")


def _born(kind: Callable[..., Any], **values: Any) -> Any:
    try:
        return kind(**values)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or kind.__name__
        raise InvalidRequestError(f"{where}: {first['msg']}", field=where, constraint=first["type"]) from e


def _positive(base_model: str, key: str, values: Mapping[str, str]) -> float | None:
    if key not in values:
        return None
    value = float(values[key])
    if not (math.isfinite(value) and value > 0):
        raise _bad_suffix(base_model, f"{key}{values[key]} is not above 0 and finite")
    return value


def _count(name: str, value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, str | float):
        whole = float(value)
        value = int(whole) if math.isfinite(whole) and whole == int(whole) else 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _refuse(f"{name} is not a whole number from 1", name, "a whole number from 1")
    return value


def _same(one: Any, other: Any) -> bool:
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (one, other))
    return math.isclose(one, other, rel_tol=1e-12) if numbers else one == other


def _unknown_type(kind: Any) -> InvalidRequestError:
    return _refuse(
        f"optimizer type {kind!r} is not offered; offered: {', '.join(_OPTIMIZERS)}",
        "optimizer_config.type",
        "one of: " + ", ".join(_OPTIMIZERS),
    )


def _unknown_fields(what: str, unknown: Mapping[str, Any], known: tuple[str, ...]) -> InvalidRequestError:
    named = ", ".join(sorted(unknown))
    takes = ", ".join(known) if known else "no settings"
    return _refuse(
        f"{what} does not know {named}; it takes: {takes}. Settings of privacy belong to type {DP_ADAMW!r}",
        f"optimizer_config.{min(unknown)}",
        f"known: {takes}",
    )


def _bad_suffix(base_model: str, why: str) -> InvalidRequestError:
    return _refuse(
        f"the privacy suffix of {base_model!r} cannot be used: {why}; it has the form {_SUFFIX}",
        "base_model",
        _SUFFIX,
    )


def _refuse(message: str, field: str, constraint: str) -> InvalidRequestError:
    return InvalidRequestError(message, field=field, constraint=constraint)


__all__ = ["ALPHA", "DP_ADAMW", "PLANNED_STEPS", "DPRequest", "model_and_request", "step_params", "training_config"]

"""The configuration of a run that was asked for in the Tinker protocol, and what was asked about its privacy.

Two ways in: a suffix of the model's name, which scripts need not be changed for, and the optimizer type ``dp_adamw``.
Both are requests: on a key with a policy ``KeyPolicy.apply`` has the last word, and plain AdamW trains privately too.
What cannot be understood is refused, so that nobody trains without the privacy that they asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from tg_tinker.errors import DPUnsupportedError, InvalidRequestError
from tg_tinker.types import DPConfig, LoRAConfig, OptimizerConfig, TrainingConfig
from tg_tinker.types.optim import AdamParams
from tg_tinker_server.gateway.dp_request import (
    ALIASES,
    DP_ADAMW,
    OPTIMIZERS,
    DPRequest,
    asked_together,
    model_and_request,
    of_optimizer,
    refusal,
    same,
    unknown_fields,
    unknown_type,
)
from tg_tinker_server.service.caller import Caller

PLANNED_STEPS = 200
"""Steps that the noise is solved for where neither the noise nor a number of steps is given."""
ALPHA = 32.0
"""Of every adapter: the protocol leaves it to the server."""
MAX_TOKENS = 1 << 20
"""No limit of our own on a sequence: the model's is smaller."""
_GROUPS = (("train_attn", "@attention"), ("train_mlp", "@mlp"), ("train_unembed", "@unembed"))
_COUPLED_UNITS = ("group", "pair", "user", "site")
_FIXED = ("target_epsilon", "target_delta", "max_grad_norm", "noise_multiplier", "dataset_id", "privacy_unit")
_ADAM = ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm")


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
    asked = asked_together(by_name, of_optimizer(optimizer))
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
        raise refusal("optim_step has adam_params and optimizer_params; send one of them", "optimizer_params", "one")
    given = dict(adam if adam is not None else optimizer or {})
    kind = given.pop("type", None) or "adamw"
    if kind not in OPTIMIZERS:
        raise unknown_type(kind)
    settings = {k: given.pop(k) for k in _ADAM if k in given}
    given = {ALIASES.get(k, k): v for k, v in given.items() if v is not None}
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
            if value is not None and value != getattr(dp, key) and not same(value, getattr(dp, key)):
                raise refusal(
                    f"{key}={value!r} differs from the run's {getattr(dp, key)!r}, which is fixed when the model is "
                    "created; leave it out here",
                    f"optimizer_params.{key}",
                    "as at creation",
                )
    if given:
        raise unknown_fields(f"optim_step with {kind}", given, _ADAM)
    for key, value in settings.items():
        if value is None:  # no default: the step would be charged at a rate that nobody chose
            raise refusal(
                f"{key} is null, which is how clients write infinity and NaN; send a number, or leave it out",
                f"adam_params.{key}",
                "a finite number",
            )
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise refusal(f"{key}={value!r} is not a number", f"adam_params.{key}", "a number")
    return AdamParams(**{k: float(v) for k, v in settings.items()})


def _complete(asked: DPRequest) -> tuple[dict[str, Any], int | None]:
    """Nobody's policy fills in what is missing."""
    if asked.target_epsilon is None:
        raise refusal(
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
        raise refusal(
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

"""What was asked about privacy in the Tinker protocol: by the model's name, or by the optimizer's type."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from tg_tinker.errors import DPUnsupportedError, InvalidRequestError

DP_ADAMW = "dp_adamw"
OPTIMIZERS = ("adamw", DP_ADAMW)
_SUFFIX = ":dp-eps<epsilon>[-delta<d>][-clip<c>][-steps<n>][-noise<s>], such as :dp-eps4-delta1e-6-clip0.5-steps200"
_PART = re.compile(r"-(eps|delta|clip|steps|noise)(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", re.IGNORECASE)


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


ALIASES = {"delta": "target_delta", "epsilon": "target_epsilon", "clip": "max_grad_norm", "steps": "planned_steps"}
_FIELDS = tuple(f.name for f in fields(DPRequest))


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


def of_optimizer(optimizer: Mapping[str, Any] | None) -> DPRequest | None:
    """What an optimizer's type and settings ask for; ``None`` for plain adamw.

    Raises:
        InvalidRequestError: an unknown type, an unknown setting or one that cannot be read.
        DPUnsupportedError: Poisson sampling, which these clients cannot do.
    """
    given = {k: v for k, v in (optimizer or {}).items() if v is not None}
    kind = given.pop("type", "adamw")
    if kind not in OPTIMIZERS:
        raise unknown_type(kind)
    if kind != DP_ADAMW:
        if given:
            raise unknown_fields(f"optimizer type {kind!r}", given, ())
        return None
    named: dict[str, Any] = {}
    for key, value in given.items():
        field = ALIASES.get(key, key)
        if field in named:
            raise refusal(f"{DP_ADAMW} gives {field} twice", f"optimizer_config.{key}", "once")
        named[field] = value
    unknown = {k: v for k, v in named.items() if k not in _FIELDS}
    if unknown:
        raise unknown_fields(f"optimizer type {DP_ADAMW!r}", unknown, (*_FIELDS, *ALIASES))
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
            raise refusal(f"{key}={value!r} is not a number", f"optimizer_config.{key}", "a number")
        if value is not None and not (math.isfinite(value) and value > 0):
            raise refusal(f"{key}={value!r} is not above 0 and finite", f"optimizer_config.{key}", "above 0, finite")
    return DPRequest(**named)


def asked_together(by_name: DPRequest | None, by_optimizer: DPRequest | None) -> DPRequest | None:
    """Both as one.

    Raises:
        InvalidRequestError: they contradict each other.
    """
    if by_name is None or by_optimizer is None:
        return by_name or by_optimizer
    merged = {}
    for field in _FIELDS:
        one, other = getattr(by_name, field), getattr(by_optimizer, field)
        if one is not None and other is not None and not same(one, other):
            raise refusal(
                f"the model's name asks for {field} {one}, the optimizer for {other}; say it once",
                f"optimizer_config.{field}",
                "as in the model's name",
            )
        merged[field] = other if one is None else one
    return DPRequest(**merged)


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
        raise refusal(f"{name} is not a whole number from 1", name, "a whole number from 1")
    return value


def same(one: Any, other: Any) -> bool:
    """Equal, numbers up to float rounding."""
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (one, other))
    return math.isclose(one, other, rel_tol=1e-12) if numbers else one == other


def unknown_type(kind: Any) -> InvalidRequestError:
    """An optimizer type that is not offered."""
    return refusal(
        f"optimizer type {kind!r} is not offered; offered: {', '.join(OPTIMIZERS)}",
        "optimizer_config.type",
        "one of: " + ", ".join(OPTIMIZERS),
    )


def unknown_fields(what: str, unknown: Mapping[str, Any], known: tuple[str, ...]) -> InvalidRequestError:
    """Settings that ``what`` does not have."""
    named = ", ".join(sorted(unknown))
    takes = ", ".join(known) if known else "no settings"
    return refusal(
        f"{what} does not know {named}; it takes: {takes}. Settings of privacy belong to type {DP_ADAMW!r}",
        f"optimizer_config.{min(unknown)}",
        f"known: {takes}",
    )


def _bad_suffix(base_model: str, why: str) -> InvalidRequestError:
    return refusal(
        f"the privacy suffix of {base_model!r} cannot be used: {why}; it has the form {_SUFFIX}",
        "base_model",
        _SUFFIX,
    )


def refusal(message: str, field: str, constraint: str) -> InvalidRequestError:
    """An error that names a field."""
    return InvalidRequestError(message, field=field, constraint=constraint)

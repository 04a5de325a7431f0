"""What a key may only do: one dataset, at one privacy. Its holder can ask for less, never for more."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tg_tinker.errors import AuthorizationError, InvalidRequestError
from tg_tinker.types import DPConfig, TrainingConfig

Unit = Literal["datum", "group", "pair", "user", "sequence", "site"]
_UNITS_OF: dict[str, tuple[str, ...]] = {
    "datum": ("datum",),
    "ids": ("datum", "group", "pair", "user", "sequence", "site"),
    "prompt": ("group",),
    "adjacent_pair": ("pair",),
}


class KeyPolicy(BaseModel):
    """The privacy of every run that a key makes, and the only runs and artifacts that it sees.

    A key with a policy trains on one dataset under these terms, whatever its holder sends; runs and artifacts of
    other datasets, or made under looser terms, do not exist for it. It samples base models and artifacts of its
    dataset. It registers no dataset and imports nothing.

    Attributes:
        dataset_id: whose budget every run spends.
        privacy_unit: what one epsilon protects.
        target_epsilon, target_delta: the promise. They belong to the dataset: its runs all have the same.
        max_grad_norm: the bound on one unit's contribution where a run names none. Any bound is as private.
        noise_multiplier: the least; "auto" solves for ``target_epsilon`` over ``planned_steps``.
        planned_steps: of a run, the least with "auto".
        sampling, max_participation: as in ``DPConfig``. A draw that only the client vouches for is not offered.
        diagnostics: "off" returns no exact loss, norm or log-probability of a training batch.
        merge_units, batch_size: where a run names none.
        unit_of: who says which datums are one unit; it must suit ``privacy_unit``. "ids": the caller, of whom that is
            trusted. "datum": each is its own, known by its tokens. "prompt" and "adjacent_pair": the server finds
            them in the datums, through every door.
        custom_loss: "independent" attests that the losses which callers compute themselves couple no units. Every
            run has it, and the report says so.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset_id: str = Field(min_length=1, max_length=200)
    privacy_unit: Unit = "datum"
    target_epsilon: float = Field(gt=0, allow_inf_nan=False)
    target_delta: float = Field(gt=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0, allow_inf_nan=False)
    noise_multiplier: float | Literal["auto"] = 1.0
    planned_steps: int | None = Field(None, ge=1, le=10**9)
    sampling: Literal["none", "max_participation"] = "none"
    max_participation: int | None = Field(None, ge=1)
    diagnostics: Literal["owner", "off"] = "off"
    merge_units: bool = False
    batch_size: int = Field(1, ge=1, le=10**9)
    unit_of: Literal["datum", "ids", "prompt", "adjacent_pair"] = "datum"
    custom_loss: Literal["refuse", "independent"] = "refuse"

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.noise_multiplier == "auto" and self.planned_steps is None:
            raise ValueError("noise_multiplier='auto' needs planned_steps: how many steps the budget must last")
        if self.privacy_unit not in _UNITS_OF[self.unit_of]:
            raise ValueError(
                f"unit_of={self.unit_of!r} does not name units of privacy_unit={self.privacy_unit!r}; it names: "
                f"{', '.join(_UNITS_OF[self.unit_of])}"
            )
        DPConfig(**self._terms())  # what no run could have, no policy has
        return self

    @classmethod
    def of_toml(cls, path: Path) -> KeyPolicy:
        """Read a policy file.

        Raises:
            InvalidRequestError: it cannot be read, or a setting is unknown or impossible, named.
        """
        try:
            values = tomllib.loads(path.read_text())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
            raise InvalidRequestError(f"cannot read {path}: {e}", field="policy", constraint="TOML") from e
        try:
            return cls.model_validate(values)
        except ValidationError as e:
            problems = "; ".join(
                f"{'.'.join(map(str, p['loc'])) or 'policy'}: {p['msg'].removeprefix('Value error, ')}"
                for p in e.errors()
            )
            raise InvalidRequestError(f"policy: {problems}", field="policy", constraint="known settings only") from e

    def to_json(self) -> str:
        """For the key's row."""
        return json.dumps(self.model_dump(), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> KeyPolicy:
        """From the key's row."""
        return cls.model_validate_json(text)

    def apply(self, config: TrainingConfig) -> TrainingConfig:
        """A configuration with what it leaves open filled in: the privacy of a run of this key.

        Only what was set counts as asked for, so a ``DPConfig`` made of defaults asks for nothing.

        Raises:
            InvalidRequestError: it asks for something looser or other, named.
        """
        asked = {} if config.dp_config is None else config.dp_config.model_dump(exclude_unset=True)
        if asked.get("dataset_id", "") is None:
            del asked["dataset_id"]  # a run of its own name would have a budget of its own
        steps = config.max_steps or self.planned_steps
        try:
            applied = TrainingConfig.model_validate(
                {**config.model_dump(), "dp_config": {**self._terms(), **asked}, "max_steps": steps}
            )
        except ValidationError as e:
            first = e.errors()[0]
            raise _looser("dp_config", f"the configuration cannot be: {first['msg']}") from e
        self.require(applied)
        return applied

    def require(self, config: TrainingConfig) -> None:
        """Refuse a configuration that promises less than this policy.

        Raises:
            InvalidRequestError: naming the first setting that does.
        """
        dp = config.dp_config
        if dp is None or not dp.enabled:
            raise _looser("dp_config.enabled", "this key trains with differential privacy only")
        for name in ("dataset_id", "privacy_unit", "target_epsilon", "target_delta", "sampling"):
            if getattr(dp, name) != getattr(self, name):
                raise _looser(
                    f"dp_config.{name}",
                    f"{name}={getattr(dp, name)!r}, and the policy of this key says {getattr(self, name)!r}",
                )
        if dp.allow_unnoised_steps:
            raise _looser("dp_config.allow_unnoised_steps", "the policy of this key allows no step without noise")
        if dp.initial_weights != "base":
            raise _looser("dp_config.initial_weights", "the policy of this key lets nobody attest public weights")
        if self.custom_loss == "refuse" and dp.custom_loss != "refuse":
            raise _looser("dp_config.custom_loss", "the policy of this key lets nobody attest losses of their own")
        if self.diagnostics == "off" and dp.diagnostics != "off":
            raise _looser("dp_config.diagnostics", "the policy of this key has diagnostics='off'")
        if self.max_participation is not None and (dp.max_participation or math.inf) > self.max_participation:
            raise _looser(
                "dp_config.max_participation",
                f"max_participation={dp.max_participation}, and the policy of this key says {self.max_participation}",
            )
        self._require_noise(config, dp)

    def _require_noise(self, config: TrainingConfig, dp: DPConfig) -> None:
        asked, least = dp.noise_multiplier, self.noise_multiplier
        if least == "auto":
            if asked != "auto":
                raise _looser("dp_config.noise_multiplier", "the policy of this key says 'auto'")
            if (config.max_steps or 0) < (self.planned_steps or 0):
                raise _looser("max_steps", f"the policy of this key plans {self.planned_steps} steps, at the least")
        elif asked == "auto" or asked < least:
            raise _looser("dp_config.noise_multiplier", f"the policy of this key says {least}, at the least")

    def admits(self, config: TrainingConfig) -> bool:
        """Whether a run of this configuration exists for the key."""
        try:
            self.require(config)
        except InvalidRequestError:
            return False
        return True

    def refuse_named_units(self, units: Sequence[str] | None) -> None:
        """Refuse units that a caller names itself, unless the policy leaves that to its callers.

        Fresh names for the same people would be counted as other people.

        Raises:
            InvalidRequestError: there are some, and ``unit_of`` is not "ids".
        """
        if units and self.unit_of != "ids":
            raise InvalidRequestError(
                f"the policy of this key has unit_of={self.unit_of!r}: who is one unit is not the caller's to say; "
                "leave privacy_unit_ids out"
                + ("" if self.unit_of == "datum" else ", the server finds the units in the datums itself"),
                field="privacy_unit_ids",
                constraint="left out",
            )

    def refuse_batches(self, units: Sequence[str] | None) -> None:
        """Refuse what is no list of datums where the units are found in datums, and units that a caller may not name.

        Raises:
            InvalidRequestError: naming what the key can send.
        """
        if self.unit_of in ("prompt", "adjacent_pair"):
            raise InvalidRequestError(
                f"the policy of this key has unit_of={self.unit_of!r}: units are found in datums, and here are none; "
                "send datums with a loss_fn",
                field="batch",
                constraint="datums",
            )
        self.refuse_named_units(units)

    def _terms(self) -> dict[str, Any]:
        names = (
            "dataset_id",
            "privacy_unit",
            "target_epsilon",
            "target_delta",
            "max_grad_norm",
            "noise_multiplier",
            "sampling",
            "max_participation",
            "diagnostics",
            "merge_units",
            "custom_loss",
        )
        return {name: getattr(self, name) for name in names}


def refuse_by_policy(what: str) -> AuthorizationError:
    """What a key with a policy may not do at all, of whatever it is asked."""
    return AuthorizationError(
        f"a key with a policy may not {what}; use a key of the tenant without one", details={"policy": True}
    )


def _looser(field: str, message: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{message}; leave it out, and the policy fills it in", field=field, constraint="as the key's policy"
    )

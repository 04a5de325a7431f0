"""What a run is made of: model, adapter, optimizer, privacy. Checked on both sides."""

from __future__ import annotations

import math
import unicodedata
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

MANY = 10**9  # no count in a configuration is larger
OPTIMIZERS = ("adamw", "adam", "sgd", "adafactor")
LR_SCHEDULERS = ("constant", "linear", "cosine", "cosine_with_restarts")


def _count_or_auto(value: object) -> object:
    if isinstance(value, str) and value.isdecimal():  # from the environment
        value = int(value)
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MANY):
        raise ValueError(f'a whole number from 1, or "auto"; got {value!r}')
    return value


CountOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_count_or_auto)]
"""A whole number from 1, or "auto"; whatever else is refused in one line."""


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())


class LoRAConfig(_Config):
    """A low-rank adapter (Hu et al. 2021): W + (alpha / rank) B A on each target module.

    Attributes:
        frozen_factor: "a" or "b": that factor of every adapter stays as it was loaded or began, for methods of
            federated learning that average one factor exactly (FFA-LoRA, Sun et al. 2024; RoLoRA, Chen et al. 2024).
            It has no gradient, no part in clipping, noise or decay, and is saved and loaded with the rest. B begins
            at zero, where A has no gradient: freeze "b" only in a run that loads weights.
    """

    rank: int = Field(16, ge=1, le=4096)
    alpha: float = Field(32, gt=0, allow_inf_nan=False)
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    target_modules: list[str] | Literal["all-linear"] = Field(default_factory=lambda: ["q_proj", "v_proj"])
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: list[str] = Field(default_factory=list)
    frozen_factor: Literal["a", "b"] | None = None

    @field_validator("target_modules")
    @classmethod
    def _not_empty(cls, value: list[str] | str) -> list[str] | str:
        if not value:
            raise ValueError("target_modules is empty: name at least one module, or use 'all-linear'")
        return value


class OptimizerConfig(_Config):
    """The optimizer and its schedule. Under differential privacy all of it is post-processing and free.

    ``max_grad_norm`` is a global clip of the mean gradient AFTER noise; the per-unit bound is in DPConfig.
    ``proximal_mu`` adds ``mu * (w - w_anchor)`` to the gradient of every step, after noise and global clip (FedProx,
    Li et al. 2020). The anchor is the weights that the run began with, or those that it last loaded with load_state.
    ``lr_scheduler`` other than "constant" needs ``TrainingConfig.max_steps`` or ``lr_scheduler_kwargs``
    ``{"total_steps": n}``.
    """

    name: str = "adamw"
    learning_rate: float = Field(1e-4, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = True
    warmup_steps: int = Field(0, ge=0, le=MANY)
    lr_scheduler: str = "constant"
    lr_scheduler_kwargs: dict[str, Annotated[float, Field(ge=0, le=MANY, allow_inf_nan=False)]] = Field(
        default_factory=dict
    )
    max_grad_norm: float | None = Field(None, gt=0)
    proximal_mu: float = Field(0.0, ge=0, allow_inf_nan=False)

    @field_validator("name")
    @classmethod
    def _known_optimizer(cls, value: str) -> str:
        if value not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {value!r}; known: {', '.join(OPTIMIZERS)}")
        return value

    @field_validator("lr_scheduler")
    @classmethod
    def _known_scheduler(cls, value: str) -> str:
        if value not in LR_SCHEDULERS:
            raise ValueError(f"unknown lr_scheduler {value!r}; known: {', '.join(LR_SCHEDULERS)}")
        return value

    @field_validator("betas")
    @classmethod
    def _betas_in_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= b < 1 for b in value):
            raise ValueError(f"betas must lie in [0, 1), got {value}")
        return value


class DPConfig(_Config):
    """Differential privacy for one dataset. Giving one turns privacy on.

    Attributes:
        noise_multiplier: noise standard deviation divided by ``max_grad_norm``; "auto" solves for
            ``target_epsilon`` over ``TrainingConfig.max_steps``.
        max_grad_norm: L2 bound C on one privacy unit's contribution to a step.
        target_epsilon: the promise; a step that would exceed it is refused. ``None`` or inf: no limit.
        target_delta: should be below 1 / number of units.
        accountant_type: "rdp" gates and reports; "prv" is tighter for a schedule fixed in advance by
            ``max_steps``; "gdp" is a central-limit estimate and no bound, so the gate stays "rdp".
        dataset_id: whose budget is spent; every run naming it shares it. ``None``: the run is its own.
        dataset_size: number of privacy units in the dataset; needed for "poisson" unless the dataset is registered.
        sampling: "none" claims no amplification; "poisson": the server draws batches from a registered dataset, or
            you draw them with data.PoissonSampler and attest it; "max_participation": the server counts how often
            each unit takes part.
        max_participation: most steps one unit may take part in, for that mode. Without privacy_unit_ids a unit is
            known by its input tokens: equal records are told apart within a step only, so each is charged for the
            steps of all its equals, never for fewer than its own. A record whose tokens change between steps counts
            as another one: then give ids.
        privacy_unit: what one epsilon protects; "datum" is a record, "site" all that one party of a federation sends.
        diagnostics: "owner" returns exact losses and norms to the caller; "off" returns none.
        merge_units: the same unit in several calls of one logical batch is summed and clipped once. Units that are
            known by their content are not: equal content may be of two.
        initial_weights: "public" attests that checkpoints of runs without privacy, when loaded into this run, were
            trained on public data; the ledger and the report say so. With "base" they are refused.
        custom_loss: "independent" attests that losses which the caller computes itself, and sends as weights, are
            computed from one privacy unit at a time; the ledger and the report say so. With "refuse" the server
            refuses what looks like another over HTTP, and from keys with a policy.
        allow_unnoised_steps: with no finite target, permits ``apply_dp_noise=False``; epsilon is then inf.
    """

    enabled: bool = True
    noise_multiplier: float | Literal["auto"] = 1.0
    max_grad_norm: float = Field(1.0, gt=0, allow_inf_nan=False)
    target_epsilon: float | None = 8.0
    target_delta: float = Field(1e-5, gt=0, lt=1)
    accountant_type: Literal["rdp", "gdp", "prv"] = "rdp"
    secure_mode: bool = False
    dataset_id: str | None = Field(None, min_length=1, max_length=200)
    dataset_size: int | None = Field(None, ge=1)
    sampling: Literal["none", "poisson", "max_participation"] = "none"
    max_participation: int | None = Field(None, ge=1)
    privacy_unit: Literal["datum", "group", "pair", "user", "sequence", "site"] = "datum"
    diagnostics: Literal["owner", "off"] = "owner"
    merge_units: bool = False
    allow_unnoised_steps: bool = False
    initial_weights: Literal["base", "public"] = "base"
    custom_loss: Literal["refuse", "independent"] = "refuse"

    @field_validator("dataset_id")
    @classmethod
    def _one_spelling(cls, value: str | None) -> str | None:
        if value is not None and (
            value != value.strip() or not value.isprintable() or value != unicodedata.normalize("NFC", value)
        ):
            raise ValueError(
                "dataset_id must be printable, in Unicode form NFC, without spaces at its ends: two spellings of "
                "one name would have two budgets"
            )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        sigma = self.noise_multiplier
        if sigma != "auto" and not (sigma > 0 and math.isfinite(sigma)):
            raise ValueError(f"noise_multiplier must be positive and finite or 'auto', got {sigma}")
        if self.target_epsilon is not None and not self.target_epsilon > 0:
            raise ValueError(f"target_epsilon must be positive, got {self.target_epsilon}")
        if self.sampling == "poisson" and self.dataset_size is None and self.dataset_id is None:
            raise ValueError(
                "sampling='poisson' needs dataset_size (the rate is expected batch / dataset_size), or the "
                "dataset_id of a registered dataset"
            )
        if self.sampling == "max_participation" and self.max_participation is None:
            raise ValueError("sampling='max_participation' needs max_participation")
        if self.noise_multiplier == "auto" and not self.finite_target:
            raise ValueError("noise_multiplier='auto' needs a finite target_epsilon to solve for")
        if self.allow_unnoised_steps and self.finite_target:
            raise ValueError("allow_unnoised_steps needs target_epsilon=None: an un-noised step costs infinity")
        return self

    @property
    def finite_target(self) -> bool:
        """Whether there is a budget to exceed."""
        return self.target_epsilon is not None and math.isfinite(self.target_epsilon)

    @classmethod
    def preset(cls, name: Literal["strong", "moderate", "relaxed"], **overrides: Any) -> DPConfig:
        """Three starting points: strong (epsilon 3), moderate (8), relaxed (15).

        >>> DPConfig.preset("strong").noise_multiplier
        1.5
        """
        presets = {"strong": (1.5, 0.5, 3.0), "moderate": (1.0, 1.0, 8.0), "relaxed": (0.5, 1.5, 15.0)}
        if name not in presets:
            raise ValueError(f"unknown preset {name!r}; known: {', '.join(presets)}")
        sigma, clip, epsilon = presets[name]
        return cls(**{"noise_multiplier": sigma, "max_grad_norm": clip, "target_epsilon": epsilon, **overrides})


class TrainingConfig(_Config):
    """One training run.

    Attributes:
        model_ref: name of a base model the server offers.
        lora_config: the adapter; ``None`` trains every parameter.
        batch_size: expected records of one ``forward_backward``.
        gradient_accumulation_steps: calls per step; ``batch_size`` times this is the public divisor under
            differential privacy.
        max_sequence_length: longer records are refused, never cut.
        mixed_precision: precision of the frozen base; "bf16" is used without privacy only, and where it is faster.
            Adapters, norms and sums are always float32.
        loss_scale: static; "dynamic" is refused under DP, because skipping a step depends on data.
        max_steps: planned steps; the run is completed when they are done.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        micro_batch_size: most records in one run through the model; "auto" goes by the server's memory. A batch of
            any size is cut by itself, with the same result up to rounding; with dropout each piece draws other masks.
        seed: governs initialisation and dropout, never noise.
        model_kwargs: reserved; no server offers any yet, so it must be empty.
    """

    model_ref: str = Field(min_length=1, max_length=500)
    lora_config: LoRAConfig | None = None
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    dp_config: DPConfig | None = None
    batch_size: int = Field(8, ge=1, le=MANY)
    gradient_accumulation_steps: int = Field(1, ge=1, le=MANY)
    max_sequence_length: int = Field(2048, ge=2)
    mixed_precision: Literal["bf16", "fp32", "no"] = "bf16"
    loss_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["dynamic"] = 128.0
    gradient_checkpointing: bool = False
    micro_batch_size: CountOrAuto = "auto"
    max_steps: int | None = Field(None, ge=1, le=MANY)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    model_kwargs: dict[str, Any] = Field(default_factory=dict, max_length=0)
    metadata: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _schedulable(self) -> Self:
        needs_total = self.optimizer.lr_scheduler != "constant"
        if needs_total and self.max_steps is None and "total_steps" not in self.optimizer.lr_scheduler_kwargs:
            raise ValueError(
                f"lr_scheduler={self.optimizer.lr_scheduler!r} needs max_steps, "
                "or lr_scheduler_kwargs={'total_steps': n}"
            )
        dp = self.dp_config
        if dp is not None and dp.enabled:
            if dp.noise_multiplier == "auto" and self.max_steps is None:
                raise ValueError("noise_multiplier='auto' needs max_steps: how many steps the budget must last")
            if dp.dataset_size is not None and dp.target_delta >= 1 / dp.dataset_size:
                raise ValueError(
                    f"target_delta {dp.target_delta:g} is not below 1 / dataset_size = {1 / dp.dataset_size:g}: such "
                    "a promise allows publishing a whole record"
                )
            if dp.dataset_size is not None and self.expected_batch_size > dp.dataset_size:
                raise ValueError(
                    f"the expected batch ({self.expected_batch_size}) is larger than dataset_size ({dp.dataset_size})"
                )
        return self

    @property
    def private(self) -> bool:
        """Whether differential privacy is on."""
        return self.dp_config is not None and self.dp_config.enabled

    @property
    def expected_batch_size(self) -> int:
        """Public divisor of a step: ``batch_size * gradient_accumulation_steps`` records."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def sample_rate(self) -> float:
        """Poisson inclusion probability; 1.0 unless sampling is "poisson"."""
        dp = self.dp_config
        if dp is None or dp.sampling != "poisson" or dp.dataset_size is None:
            return 1.0
        return self.expected_batch_size / dp.dataset_size

"""A training run as the server describes it to its owner."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from tg_tinker.types.configs import TrainingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyState:
    """Where a dataset's budget stands.

    Attributes:
        epsilon_spent: by every run on the dataset, at ``delta``.
        target_epsilon: the promise; inf when there is none.
        noise_multiplier: in use, solved for when the configuration says "auto".
        sample_rate: of the Poisson draw; 1.0 where no amplification is claimed.
        expected_batch_size: the public divisor of a step, in records.
        ledger_head: hash of the ledger's last entry.
    """

    dataset_id: str
    epsilon_spent: float
    target_epsilon: float
    delta: float
    noise_multiplier: float
    sample_rate: float
    expected_batch_size: float
    ledger_head: bytes = b""

    @property
    def total_epsilon(self) -> float:
        """Another word for ``epsilon_spent``."""
        return self.epsilon_spent


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelData:
    """What a run is built on; ``arch`` is the family of the base model."""

    arch: str
    model_name: str
    tokenizer_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """One run.

    Attributes:
        status: active, completed or failed.
        next_seq: first sequence number that nobody used.
        server_epoch: changes when the server process was restarted.
        privacy: ``None`` without differential privacy.
        base_dtype: precision of the frozen base that the service chose.
        unit_key: key of the HMAC that hides privacy unit ids from the server; empty in lists.
        family: architecture of the base model, such as "llama".
        tokenizer_id: hub id of its tokenizer, or the name under which the server hands it out; empty: neither.
        request_id: that made the run.
        updated: when its durable state last changed.
    """

    run_id: str
    config: TrainingConfig
    status: str
    step: int
    created: datetime
    next_seq: int = 1
    server_epoch: str = ""
    privacy: PrivacyState | None = None
    trainable_parameters: int = 0
    base_dtype: str = ""
    unit_key: bytes = field(default=b"", repr=False)
    family: str = ""
    tokenizer_id: str = ""
    request_id: str = ""
    updated: datetime | None = None

    @property
    def model_name(self) -> str:
        """Of the base model."""
        return self.config.model_ref

    @property
    def is_lora(self) -> bool:
        """Whether an adapter is trained, and not every parameter."""
        return self.config.lora_config is not None

    @property
    def lora_rank(self) -> int | None:
        """Of the adapter."""
        return None if self.config.lora_config is None else self.config.lora_config.rank

    @property
    def model_id(self) -> str:
        """Another word for ``run_id``."""
        return self.run_id

    @property
    def model_data(self) -> ModelData:
        """Architecture, name and tokenizer of the base model."""
        return ModelData(arch=self.family, model_name=self.model_name, tokenizer_id=self.tokenizer_id)

    @property
    def privacy_unit(self) -> str | None:
        """What one epsilon protects; ``None`` without differential privacy."""
        dp = self.config.dp_config
        return dp.privacy_unit if self.config.private and dp is not None else None


@dataclass(frozen=True, slots=True, kw_only=True)
class UnloadModelResponse:
    """A run that was unloaded."""

    model_id: str
    type: str = "unload_model"

"""What the federated demo trains, as one frozen value: every figure that it prints follows from these."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tg_tinker import Dataset
from tg_tinker.types import LoRAConfig, OptimizerConfig, TrainingConfig

MODEL = "tiny-llama-2m"
DATASET, ALONE, POOLED = "icd-10-cm", "icd-10-cm-alone", "icd-10-cm-pooled"
"""Names of the sites' data in the federation, of the same texts with a second budget, and of all of them together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FederatedDemoSettings:
    """Settings found by measurement, each arm at the learning rate that suits it best.

    Attributes:
        rounds, local_steps: of the federation; a lone site and pooled data take as many steps in one piece.
        expected_batch_size: records per step and site on average; pooled data takes that of all sites together.
        eval_batch_size: held-out records in one request.
        held_out: records of each site that are declared public, for perplexity.
        train_limit: use only so many training records of a site; ``None`` is all of them.
        target_epsilon: of each site over the whole job, at ``target_delta``; the same for each arm.
        learning_rate: of the sites in the federation; ``alone_learning_rate``, ``pooled_learning_rate`` of the rest.
    """

    model_ref: str = MODEL
    rounds: int = 5
    local_steps: int = 6
    expected_batch_size: int = 128
    eval_batch_size: int = 64
    learning_rate: float = 0.03
    alone_learning_rate: float = 0.015
    pooled_learning_rate: float = 0.03
    rank: int = 16
    alpha: float = 32
    max_grad_norm: float = 1.0
    held_out: int = 170
    train_limit: int | None = None
    target_epsilon: float = 8.0
    target_delta: float = 1e-5
    seed: int = 0

    @property
    def steps(self) -> int:
        """Optimizer steps of every arm."""
        return self.rounds * self.local_steps

    def adapter(self) -> LoRAConfig:
        """The adapter that is trained."""
        return LoRAConfig(rank=self.rank, alpha=self.alpha, target_modules="all-linear")

    def job(self, *, job_id: str, expires: str) -> dict[str, Any]:
        """The federated job as ``coordinator.toml`` has it, without its roster."""
        return {
            "job_id": job_id,
            "base_model": self.model_ref,
            "rounds": self.rounds,
            "local_steps": self.local_steps,
            "batch_size": self.expected_batch_size,
            "max_sequence_length": 256,
            "min_sites": 2,
            "expires": expires,
            "seed": self.seed,
            "adapter": {"rank": self.rank, "alpha": self.alpha, "target_modules": "all-linear"},
            "optimizer": {"learning_rate": self.learning_rate, "lr_scheduler": "linear"},
            "records": {
                "target_epsilon": self.target_epsilon,
                "target_delta": self.target_delta,
                "max_grad_norm": self.max_grad_norm,
                "people": "disjoint",
            },
        }

    def alone(self, dataset: Dataset) -> TrainingConfig:
        """One site by itself."""
        return self._private(dataset, self.expected_batch_size, self.alone_learning_rate)

    def pooled(self, dataset: Dataset, *, sites: int) -> TrainingConfig:
        """All records in one place."""
        return self._private(dataset, self.expected_batch_size * sites, self.pooled_learning_rate)

    def reader(self) -> TrainingConfig:
        """A client that only opens finished adapters: it trains on nothing."""
        return TrainingConfig(
            model_ref=self.model_ref,
            lora_config=self.adapter(),
            batch_size=self.eval_batch_size,
            max_sequence_length=256,
        )

    def to_json(self) -> dict[str, Any]:
        """As the demo's folder remembers them, to notice a folder of other settings."""
        return asdict(self)

    def _private(self, dataset: Dataset, batch_size: int, learning_rate: float) -> TrainingConfig:
        return TrainingConfig(
            model_ref=self.model_ref,
            lora_config=self.adapter(),
            optimizer=OptimizerConfig(learning_rate=learning_rate, lr_scheduler="linear"),
            dp_config=dataset.dp_config(noise_multiplier="auto", max_grad_norm=self.max_grad_norm),
            batch_size=batch_size,
            max_sequence_length=256,
            max_steps=self.steps,
            seed=self.seed,
        )

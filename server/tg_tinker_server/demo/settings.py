"""What the demo trains, as one frozen value: every figure the demo prints follows from these."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tg_tinker.types import DPConfig, LoRAConfig, OptimizerConfig, TrainingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSettings:
    """Settings found by measurement: perplexity falls from about 400 to below 70 in about 60 CPU-seconds.

    Attributes:
        model_ref: the bundled language model, 2.02 million parameters.
        steps: optimizer steps the budget is planned for.
        expected_batch_size: records per step on average; the public divisor of every step.
        micro_batch_size: most records of one ``forward_backward``, grouped by length to save padding.
        held_out: records kept out of training and declared public, for perplexity.
        train_limit: use only so many training records; ``None`` is all of them.
        dataset_id: whose budget is spent.
        target_epsilon: the promise at ``target_delta``, which is below 1 / number of records.
        prompts: what the model completes before and after.
    """

    model_ref: str = "tiny-llama-2m"
    steps: int = 90
    expected_batch_size: int = 128
    micro_batch_size: int = 64
    learning_rate: float = 0.015
    rank: int = 16
    alpha: float = 32
    max_grad_norm: float = 1.0
    held_out: int = 512
    train_limit: int | None = None
    dataset_id: str = "icd-10-cm-diagnoses"
    target_epsilon: float = 8.0
    target_delta: float = 2e-5
    prompts: tuple[str, ...] = ("Other", "Chronic", "Disorder of", "Poisoning by")
    max_sample_tokens: int = 24
    temperature: float = 0.4

    def training_config(self, *, dataset_size: int) -> TrainingConfig:
        """The configuration of the private run over ``dataset_size`` records."""
        return TrainingConfig(
            model_ref=self.model_ref,
            lora_config=self._adapter(),
            optimizer=OptimizerConfig(learning_rate=self.learning_rate, lr_scheduler="linear"),
            dp_config=DPConfig(
                noise_multiplier="auto",
                max_grad_norm=self.max_grad_norm,
                target_epsilon=self.target_epsilon,
                target_delta=self.target_delta,
                dataset_id=self.dataset_id,
                dataset_size=dataset_size,
                sampling="poisson",
            ),
            batch_size=self.micro_batch_size,
            gradient_accumulation_steps=self.expected_batch_size // self.micro_batch_size,
            max_sequence_length=256,
            mixed_precision="fp32",
            max_steps=self.steps,
            seed=0,
        )

    def reader_config(self) -> TrainingConfig:
        """The configuration of a client that only opens the finished checkpoint: it trains on nothing."""
        return TrainingConfig(
            model_ref=self.model_ref,
            lora_config=self._adapter(),
            batch_size=self.micro_batch_size,
            max_sequence_length=256,
            mixed_precision="fp32",
        )

    def _adapter(self) -> LoRAConfig:
        return LoRAConfig(rank=self.rank, alpha=self.alpha, target_modules="all-linear")

    def to_json(self) -> dict[str, Any]:
        """As the demo's folder remembers them, to notice a folder of another version."""
        return {**asdict(self), "prompts": list(self.prompts)}

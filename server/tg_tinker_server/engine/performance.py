"""Settings that change speed and memory, and no result beyond rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class PerformanceConfig:
    """How the torch backend uses its machine.

    Attributes:
        device: "cpu", "cuda" or "cuda:0"; "auto" takes a GPU if there is one.
        base_dtype: precision of frozen base models. "auto" takes bfloat16 where a run asks for it and a measurement
            finds it faster, else float32. Private runs have float32 whatever is set.
        micro_batch_tokens: most tokens, padding included, in one pass through the model. "auto" finds them for each
            run from ``activation_bytes`` and what its model keeps for a token.
        activation_bytes: most memory for what a pass keeps for its backward pass.
        per_sample_bytes: most memory for the per-sample gradients of one micro-batch.
        generation_rows: most sequences generated at once.
        prefix_bytes: most memory for what was kept of prompts, for others that begin alike.
    """

    device: str = "cpu"
    base_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    micro_batch_tokens: int | Literal["auto"] = "auto"
    activation_bytes: int = 2**30
    per_sample_bytes: int = 512 * 2**20
    generation_rows: int = 64
    prefix_bytes: int = 512 * 2**20

    def __post_init__(self) -> None:
        for name in ("micro_batch_tokens", "activation_bytes", "per_sample_bytes", "generation_rows", "prefix_bytes"):
            value = getattr(self, name)
            if value != "auto" and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.device == "auto":
            object.__setattr__(self, "device", "cuda" if torch.cuda.is_available() else "cpu")

"""A real server in this process whose engine is watched, and a client of it: where every instrument works."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from tg_tinker import ServiceClient, TrainingClient
from tg_tinker.types import DPConfig, LoRAConfig, OptimizerConfig, TrainingConfig
from tg_tinker_server.app import EmbeddedServer, build_backend
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.empirical.planting import PlantingBigramBackend
from tg_tinker_server.empirical.settings import AuditSettings
from tg_tinker_server.empirical.watching import Watch, WatchedBackend

Record = tuple[int, ...]
_LOWEST_TOKEN = 4  # below are the special ones


@dataclass(frozen=True, slots=True)
class Bench:
    """One audit's tools."""

    settings: AuditSettings
    service: ServiceClient
    watch: Watch
    rng: np.random.Generator
    vocab_size: int

    def open(
        self, dp: DPConfig, *, batch_size: int, learning_rate: float, max_steps: int | None = None
    ) -> TrainingClient:
        """A new run with plain SGD, so that weights tell what was released."""
        return self.service.create_training_client(
            TrainingConfig(
                model_ref=self.settings.model,
                lora_config=LoRAConfig(rank=8, alpha=16, target_modules=self._modules),
                optimizer=OptimizerConfig(name="sgd", learning_rate=learning_rate, momentum=0.0, nesterov=False),
                dp_config=dp,
                batch_size=batch_size,
                max_sequence_length=512,
                mixed_precision="fp32",
                max_steps=max_steps,
                seed=1,
            )
        )

    @property
    def _modules(self) -> list[str] | Literal["all-linear"]:
        """Planted gradients need few parameters; records are learned by heart mostly in the feed-forward layers."""
        return ["q_proj", "v_proj"] if self.settings.mode == "gradient" else "all-linear"

    def records(self, count: int, tokens: int) -> list[Record]:
        """Random records, all different."""
        made: dict[Record, None] = {}
        while len(made) < count:
            made[tuple(self.rng.integers(_LOWEST_TOKEN, self.vocab_size, tokens).tolist())] = None
        return list(made)


@contextmanager
def bench(settings: AuditSettings) -> Iterator[Bench]:
    """Start a server with its data in a temporary folder; stop it and delete the folder at the end."""
    with tempfile.TemporaryDirectory(prefix="tg-tinker-audit-") as folder:
        config = ServerConfig(
            port=0,
            data_dir=Path(folder),
            backend=settings.backend,
            device="cpu",
            share_passes="off",
            log_level="error",
        )
        watch = Watch()
        inner = PlantingBigramBackend() if settings.backend == "bigram" else build_backend(config)
        with EmbeddedServer(config, backend=WatchedBackend(inner, watch)) as server:
            service = ServiceClient(api_key=server.mint_key("audit"), base_url=server.address)
            try:
                yield Bench(settings, service, watch, np.random.default_rng(settings.seed), _vocabulary(settings))
            finally:
                service.close()


def _vocabulary(settings: AuditSettings) -> int:
    """Tokens that records are made of: all that the model has, apart from the bigram's special ones."""
    return 256 if settings.backend == "bigram" else 2048


def chunks(records: Sequence[Record], size: int) -> Iterator[Sequence[Record]]:
    """Records in calls of at most ``size``."""
    for start in range(0, len(records), size):
        yield records[start : start + size]

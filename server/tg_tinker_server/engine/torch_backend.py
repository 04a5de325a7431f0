"""The Backend on torch: base models shared in memory, one adapter per run."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import TrainingConfig
from tg_tinker.types.info import ModelInfo
from tg_tinker_server.engine.backend import EngineState
from tg_tinker_server.engine.lora import AdaptedBase
from tg_tinker_server.engine.models import BUNDLED_MODELS, BaseModels, ModelSource
from tg_tinker_server.engine.performance import PerformanceConfig
from tg_tinker_server.engine.precision import bfloat16_pays
from tg_tinker_server.engine.sampling.seam import TokenSampler
from tg_tinker_server.engine.sampling.token_sampler import PREFILL_TOKENS, BatchedSampler
from tg_tinker_server.engine.sampling.torch_rows import TorchRows
from tg_tinker_server.engine.sampling.torch_weights import TorchWeights, put_state
from tg_tinker_server.engine.torch_session import TorchSession
from tg_tinker_server.engine.vllm.sampler import RoutedSampler
from tg_tinker_server.engine.vllm.settings import VllmConfig

WIDE = 512
"""Hidden size from which products are most of a model's work."""
GPU_PREFILL_TOKENS = 4096
"""Tokens of prompts in one slice on a GPU: fewer would not fill it."""


class TorchBackend:
    """Transformers causal language models with PEFT adapters and Opacus per-sample gradients.

    Args:
        models: what is offered, by name: a folder, a hub id, or a function that builds the model.
        performance: device, precision, memory bounds.
        vllm: how to start vLLM engines, which then sample what they can; ``None``: everything is sampled here.

    Raises:
        InvalidRequestError: the device, or the folder of a model, is not there.
    """

    def __init__(
        self,
        models: Mapping[str, ModelSource] = BUNDLED_MODELS,
        performance: PerformanceConfig | None = None,
        vllm: VllmConfig | None = None,
    ) -> None:
        self._vllm = vllm
        self._performance = performance or PerformanceConfig()
        _require_device(self._performance.device)
        # Products of float32 in fewer bits (TF32, bfloat16) would break what is promised of private runs.
        torch.set_float32_matmul_precision("highest")
        self._models = BaseModels(models, torch.device(self._performance.device))
        self._shared: dict[tuple[str, torch.dtype], AdaptedBase] = {}

    def models(self) -> list[ModelInfo]:
        """See ``backend.Backend``."""
        return self._models.infos()

    def open(self, *, run_id: str, config: TrainingConfig) -> TorchSession:  # noqa: ARG002 - part of the seam
        """See ``backend.Backend``. A base model stays in memory once a run has used it."""
        dtype = self._dtype(config)
        lora = config.lora_config
        if lora is None:
            # Weights that are trained are float32 whatever the run asks for its frozen base.
            own = AdaptedBase(self._models.load(config.model_ref, torch.float32))
            own.module.requires_grad_(True)
            return TorchSession(own, None, config, self._performance, on_close=lambda: None)
        base = self._base(config.model_ref, dtype, shared=lora.bias == "none" and not lora.modules_to_save)
        adapter = base.add(lora, seed=config.seed or 0)
        try:
            return TorchSession(base, adapter, config, self._performance, on_close=lambda: base.remove(adapter))
        except BaseException:
            base.remove(adapter)
            raise

    def open_weights(self, config: TrainingConfig, state: EngineState | None) -> TorchWeights:
        """See ``sampling.seam.SamplingBackend``."""
        dtype = self._dtype(config)
        if state is None:
            base = self._base(config.model_ref, dtype, shared=True)
            return TorchWeights(base, None, size_bytes=0, on_close=lambda: None)
        lora = config.lora_config
        if lora is None:
            own = AdaptedBase(self._models.load(config.model_ref, torch.float32))
            own.module.requires_grad_(True)
            size = put_state(own, None, state)
            own.module.requires_grad_(False)
            return TorchWeights(own, None, size_bytes=size, on_close=lambda: None)
        shared = lora.bias == "none" and not lora.modules_to_save
        base = self._base(config.model_ref, dtype, shared=shared)
        adapter = base.add(lora, seed=0)
        try:
            size = put_state(base, adapter, state)
            if not shared:
                size += sum(p.numel() * p.element_size() for p in base.module.parameters())
            return TorchWeights(base, adapter, size_bytes=size, on_close=lambda: base.remove(adapter))
        except BaseException:
            base.remove(adapter)
            raise

    def token_sampler(self) -> TokenSampler:
        """See ``sampling.seam.SamplingBackend``."""
        built_in = BatchedSampler(
            TorchRows(),
            most_rows=self._performance.generation_rows,
            prefix_bytes=self._performance.prefix_bytes,
            prefill_tokens=PREFILL_TOKENS if self._performance.device == "cpu" else GPU_PREFILL_TOKENS,
        )
        if self._vllm is None:
            return built_in
        return RoutedSampler(built_in, self._vllm, self._performance.device, self._source_of)

    def _source_of(self, base: AdaptedBase) -> str | None:
        """Folder or hub id of a base that runs share; ``None`` for a run's own copy, and for what code builds."""
        name = next((name for (name, _), shared in self._shared.items() if shared is base), None)
        source = None if name is None else self._models.source(name)
        return None if source is None else str(source)

    def _dtype(self, config: TrainingConfig) -> torch.dtype:
        """Precision of the base. Private runs have float32: in bfloat16 the rounding of every record depends on the
        shape of its micro-batch, and so on the others (removing one of 64 moved the clipped sum by up to 1.10 C).
        """
        wanted = self._performance.base_dtype
        if config.private or config.mixed_precision != "bf16" or wanted == "float32":
            return torch.float32
        pays = wanted == "bfloat16" or (
            self._models.hidden_size(config.model_ref) >= WIDE and bfloat16_pays(self._performance.device)
        )
        return torch.bfloat16 if pays else torch.float32

    def _base(self, name: str, dtype: torch.dtype, *, shared: bool) -> AdaptedBase:
        if not shared:
            # Saved modules and biases are trained too, so this copy is float32.
            return AdaptedBase(self._models.load(name, torch.float32))
        key = (name, dtype)
        if key not in self._shared:
            self._shared[key] = AdaptedBase(self._models.load(name, dtype))
        return self._shared[key]


def _require_device(name: str) -> None:
    device = torch.device(name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type != "cuda" or (device.index or 0) < count:
        return
    seen = {0: "no GPU", 1: "one GPU, cuda:0,"}.get(count, f"GPUs cuda:0 to cuda:{count - 1}")
    raise InvalidRequestError(
        f'device = "{name}", but torch sees {seen} here; set device = "cpu" or "auto"',
        field="device",
        constraint="a device of this machine",
    )

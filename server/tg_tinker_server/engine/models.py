"""Base models by name: where they come from, and what is known of each before it is loaded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types.info import ModelInfo
from tg_tinker_server.engine.fused_norm import fuse_norms
from tg_tinker_server.engine.tokenizers import Tokenizer

transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # a server's output is its log

log = structlog.get_logger()
_LOADING = threading.Lock()
"""transformers changes torch's defaults for the whole process while it loads: two loads at once leave parameters
without values."""
ModelLoader = Callable[[], tuple[nn.Module, Tokenizer]]
ModelSource = str | Path | ModelLoader
"""A folder, a hub id, or a function that builds a new causal language model and its tokenizer."""

BUNDLED_MODELS: Mapping[str, ModelSource] = {
    "tiny-llama-2m": Path(__file__).parent.parent / "assets" / "tiny-llama-2m"
}


class HubTokenizer:
    """A transformers tokenizer behind the engine's interface."""

    def __init__(self, tokenizer: Any, eos_token_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        start = tokenizer.bos_token_id
        self.start_token_id: int | None = start if start is not None else next(iter(eos_token_ids), None)

    def encode(self, text: str) -> list[int]:
        """As the tokenizer does by default, with its special tokens."""
        return list(self._tokenizer.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens left out, spaces as they are."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedModel:
    """A base model in memory, frozen and in evaluation mode."""

    name: str
    module: nn.Module
    tokenizer: Tokenizer
    vocab_size: int
    max_positions: int
    dtype: torch.dtype


class BaseModels:
    """The models a server offers.

    Args:
        sources: by public name. Nothing else can be loaded: a name from a request is only ever looked up here.
        device: where models live.

    Raises:
        InvalidRequestError: a source is a folder that is not there, or no model.
    """

    def __init__(self, sources: Mapping[str, ModelSource], device: torch.device) -> None:
        for name, source in sources.items():
            _require_model(name, source)
        self._sources = dict(sources)
        self._device = device
        self._infos: dict[str, ModelInfo] = {}
        self._widths: dict[str, int] = {}

    def infos(self) -> list[ModelInfo]:
        """What is offered, by name. A model that cannot be read is left out, and the log says why."""
        infos = []
        for name in sorted(self._sources):
            try:
                infos.append(self._info(name))
            except Exception as e:  # noqa: BLE001 - of any kind: the hub is away, a file is damaged, code is missing
                log.error("model_not_offered", model=name, error=type(e).__name__, reason=str(e))
        return infos

    def source(self, name: str) -> str | Path | None:
        """Folder or hub id of a model; ``None`` if code builds it, or it is not offered."""
        source = self._sources.get(name)
        return source if isinstance(source, str | Path) else None

    def hidden_size(self, name: str) -> int:
        """Width of a model; 0 if it is not offered or does not say."""
        if name not in self._sources:
            return 0
        self._info(name)
        return self._widths[name]

    def _info(self, name: str) -> ModelInfo:
        if name not in self._infos:
            source = self._sources[name]
            if isinstance(source, str | Path):
                config = AutoConfig.from_pretrained(source)
                with torch.device("meta"):
                    module = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
            else:
                module, _ = source()
                config = module.config
            width = getattr(config, "hidden_size", 0)
            self._widths[name] = width if isinstance(width, int) else 0
            self._infos[name] = ModelInfo(
                name=name,
                family=str(config.model_type),
                parameters=sum(p.numel() for p in module.parameters()),
                max_sequence_length=_max_positions(config),
            )
        return self._infos[name]

    def load(self, name: str, dtype: torch.dtype) -> LoadedModel:
        """A new copy of a base model in memory.

        Raises:
            InvalidRequestError: no model of that name is offered; names those that are.
        """
        if name not in self._sources:
            raise InvalidRequestError(
                f"model {name!r} is not offered here; offered: {', '.join(sorted(self._sources))}",
                field="model_ref",
                constraint="one of: " + ", ".join(sorted(self._sources)),
            )
        source = self._sources[name]
        if isinstance(source, str | Path):
            with _LOADING:
                module: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
            tokenizer: Tokenizer = HubTokenizer(AutoTokenizer.from_pretrained(source), _eos_token_ids(module))
        else:
            module, tokenizer = source()
        module = module.to(device=self._device, dtype=dtype).requires_grad_(False).eval()
        fuse_norms(module)
        return LoadedModel(
            name=name,
            module=module,
            tokenizer=tokenizer,
            vocab_size=int(module.get_input_embeddings().num_embeddings),
            max_positions=_max_positions(module.config),
            dtype=dtype,
        )


def _require_model(name: str, source: ModelSource) -> None:
    """Refuse a folder without a model. Whatever is no folder is taken for a hub id, which only its use can check."""
    if not isinstance(source, str | Path):
        return
    path = Path(source)
    local = isinstance(source, Path) or path.is_dir() or source.startswith((".", "/", "~")) or source.count("/") > 1
    if local and not (path / "config.json").is_file():
        raise InvalidRequestError(
            f'models: "{name}" is "{source}", which is {"a folder without" if path.is_dir() else "no folder with"} '
            "a config.json; give the folder of a model in the format of transformers, or a hub id",
            field="models",
            constraint="folders with a config.json, or hub ids",
        )


def _max_positions(config: Any) -> int:
    for field in ("max_position_embeddings", "n_positions", "n_ctx"):
        value = getattr(config, field, None)
        if isinstance(value, int):
            return value
    return 2048


def _eos_token_ids(module: Any) -> tuple[int, ...]:
    """End tokens from the generation settings, else from the model's configuration."""
    for settings in (getattr(module, "generation_config", None), module.config):
        value = getattr(settings, "eos_token_id", None)
        if isinstance(value, int):
            return (value,)
        if value:
            return tuple(int(i) for i in value)
    return ()

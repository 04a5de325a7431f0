"""Many low-rank adapters on one base model in memory, through PEFT.

The base is wrapped in place; a session talks to the base model itself and switches its own adapter on first. Runs
that train parts of the base (no adapter, biases, saved modules) get a copy of the base to themselves.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any, cast

import peft
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import LoRAConfig
from tg_tinker_server.engine.models import LoadedModel

_ADAPTABLE = (nn.Linear, Conv1D, nn.Embedding)
_LINEAR = (nn.Linear, Conv1D)


class AdaptedBase:
    """One base model and the adapters on it. Adapter names are made here and appear nowhere else."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self._peft: Any = None
        self._adapters: set[str] = set()
        self._count = 0
        self._active: str | None = None
        # The table of modules as they were before anything was wrapped.
        self._modules = dict(loaded.module.named_modules())
        head = cast(Any, loaded.module).get_output_embeddings()
        self._output = next((path for path, module in self._modules.items() if module is head), "")

    @property
    def module(self) -> nn.Module:
        """The model to call; ``activate`` first."""
        return self.loaded.module

    @property
    def adapters(self) -> int:
        """How many adapters share the base now."""
        return len(self._adapters)

    def add(self, config: LoRAConfig, *, seed: int) -> str:
        """Put a new adapter on the base and return its name; ``seed`` alone decides its first values.

        Raises:
            InvalidRequestError: a target or saved module does not exist, or cannot carry an adapter.
        """
        targets = self._resolve(config.target_modules)
        self._check_saved(config.modules_to_save, targets)
        self._count += 1
        name = f"adapter{self._count}"
        peft_config = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]
            lora_dropout=config.dropout,
            target_modules=targets,
            bias=config.bias,
            modules_to_save=config.modules_to_save or None,
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns about every second adapter
            torch.manual_seed(seed & 0xFFFF_FFFF_FFFF_FFFF)
            if self._peft is None:
                self._peft = peft.get_peft_model(self.module, peft_config, adapter_name=name)
            else:
                self._peft.add_adapter(name, peft_config)
        self._adapters.add(name)
        self._active = None
        return name

    def activate(self, name: str | None) -> None:
        """Make the model compute with this adapter alone, and only its parameters require gradients."""
        if name is not None and name != self._active:
            self._peft.set_adapter(name)
            self._active = name

    def remove(self, name: str) -> None:
        """Take an adapter off; with the last one the base is as it was."""
        if name not in self._adapters:
            return
        self._adapters.remove(name)
        self._active = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft names the adapter it switches to
            self._peft.delete_adapter(name)
            if not self._adapters:
                self._peft.unload()
                self._peft = None

    def _adaptable_names(self) -> list[str]:
        names = {path.rsplit(".", 1)[-1] for path, module in self._modules.items() if isinstance(module, _ADAPTABLE)}
        return sorted(names)

    def _resolve(self, targets: Sequence[str] | str) -> list[str]:
        """Full paths of the modules that the configured names mean."""
        if targets == "all-linear":
            return [path for path, m in self._modules.items() if isinstance(m, _LINEAR) and path != self._output]
        resolved: list[str] = []
        for target in targets:
            paths = [p for p in self._modules if p == target or p.endswith("." + target)]
            if not paths or not all(isinstance(self._modules[p], _ADAPTABLE) for p in paths):
                problem = "cannot carry an adapter" if paths else "does not exist"
                names = self._adaptable_names()
                raise InvalidRequestError(
                    f"target module {target!r} {problem} in {self.loaded.name}; it has {', '.join(names)}, "
                    "or use 'all-linear'",
                    field="lora_config.target_modules",
                    constraint="one of: " + ", ".join(names),
                )
            resolved.extend(p for p in paths if p not in resolved)
        return resolved

    def _check_saved(self, names: Sequence[str], targets: Sequence[str]) -> None:
        for name in names:
            paths = [p for p in self._modules if p == name or p.endswith("." + name)]
            inside = [t for t in targets if any(t == p or t.startswith(p + ".") for p in paths)]
            if inside:
                raise InvalidRequestError(
                    f"modules_to_save names {name!r}, which holds {len(inside)} module(s) that get an adapter; a "
                    "module is either trained whole or through an adapter",
                    field="lora_config.modules_to_save",
                    constraint="apart from target_modules",
                )
            if not paths:
                raise InvalidRequestError(
                    f"modules_to_save names {name!r}, which does not exist in {self.loaded.name}",
                    field="lora_config.modules_to_save",
                    constraint="existing modules",
                )


def trainable_parameters(module: nn.Module, adapter: str | None) -> dict[str, nn.Parameter]:
    """Parameters that require gradients, under names that do not depend on the adapter's, sorted.

    For adapters the names are those of PEFT's own files.
    """
    found = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            if adapter is not None:
                name = "base_model.model." + re.sub(rf"\.{adapter}(?=\.|$)", "", name)  # noqa: PLW2901
            found[name] = parameter
    return dict(sorted(found.items()))

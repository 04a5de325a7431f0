"""Many low-rank adapters on one base model in memory, through PEFT.

PEFT makes the adapters; their linear layers compute by the fused rule (fused_lora.py), for whichever adapters the
rows of a pass belong to. Runs that train parts of the base (no adapter, biases, saved modules) get a copy of the base
to themselves.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import LoRAConfig
from tg_tinker_server.engine.forward import CausalLM
from tg_tinker_server.engine.fused_lora import Rows, can_fuse, fuse
from tg_tinker_server.engine.grad_rows import GradRows, Scratch
from tg_tinker_server.engine.models import LoadedModel

_ADAPTABLE = (nn.Linear, Conv1D, nn.Embedding)
_LINEAR = (nn.Linear, Conv1D)
_ADAPTER = re.compile(r"\.(adapter\d+)(?:\.|$)")
_FACTOR = re.compile(r"\.lora_(?:embedding_)?([AB])\.(adapter\d+)(?:\.|$)")

GROUPS = ("@attention", "@mlp", "@unembed")
"""Stand in ``target_modules`` for the projections of attention, those of the feed-forward parts, the output layer."""
_ATTENTION = re.compile(r"attn|attention")
_MLP = re.compile(r"mlp|ffn|feed_forward|ff_layer|experts?$|moe")
_ROUTERS = ("gate", "router", "shared_expert_gate")  # choose experts; what they do is not feed-forward
_NO_ADAPTER = "none"  # no adapter's name


class AdaptedBase:
    """One base model and the adapters on it. Adapter names are made here and appear nowhere else."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self._peft: Any = None
        self._adapters: dict[str, str | None] = {}  # and which factor of each is frozen
        self._count = 0
        self._rows: Rows | None = None
        self._fused: set[nn.Module] = set()
        # Layers that only PEFT can compute: it has to be told which adapter is meant, one at a time.
        self._unfused = False
        self._switched: str | None = None
        self._checkpointing = False
        self.scratch = Scratch()
        self.tried: set[Hashable] = set()
        """Kinds of runs that the probe found sound on this base."""
        self.bytes_per_token: dict[Hashable, float] = {}
        """What a kind of run keeps for a token."""
        self.joins: bool | None = None
        """Whether sequences that were read apart can be computed together; ``None``: not tried."""
        # The table of modules as they were before anything was wrapped.
        self._modules = dict(loaded.module.named_modules())
        self.language_model = CausalLM(
            self.module,
            vocab_size=loaded.vocab_size,
            adapters=lambda: None if self._rows is None else self._rows.adapters,
        )
        """The model up to its losses; how to run it was tried out before anything was put on it."""
        head = cast(Any, loaded.module).get_output_embeddings()
        self._output = next((path for path, module in self._modules.items() if module is head), "")

    @property
    def module(self) -> nn.Module:
        """The model to call, inside ``computing``."""
        return self.loaded.module

    def set_checkpointing(self, on: bool) -> None:
        """Whether layers compute their activations again in the backward pass instead of keeping them."""
        model = cast(Any, self.module)
        if on == self._checkpointing or not getattr(model, "supports_gradient_checkpointing", False):
            return
        if on:
            model.activation_checkpointing_enable({"use_reentrant": False})
        else:
            model.activation_checkpointing_disable()
        self._checkpointing = on

    @contextmanager
    def training(self, on: bool = True) -> Iterator[None]:
        """The model in training mode, if ``on``; afterwards in evaluation mode."""
        if on:
            self.module.train()  # slow: only where dropout or checkpointing want it
        try:
            yield
        finally:
            if self.module.training:
                self.module.eval()

    @contextmanager
    def by_peft(self, adapter: str | None) -> Iterator[None]:
        """Within it PEFT computes this adapter alone, without the fused rule: a second, independent answer."""
        if adapter is not None:
            self._switch(adapter)
        with self.computing(None):
            yield

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
        self._adapters[name] = config.frozen_factor
        self._fuse_layers()
        self._switch(name)
        self.module.eval()  # what PEFT adds is in training mode
        return name

    def _switch(self, name: str) -> None:
        """Tell PEFT which adapter is meant; what is trained in each stays as it was, which it does not want."""
        if name == self._switched:
            return
        self._peft.set_adapter(name)
        self._switched = name
        self._keep_as_configured()

    def _keep_as_configured(self) -> None:
        """Undo that PEFT, whenever it makes an adapter the active one, trains all of it and freezes all others."""
        for path, parameter in self.module.named_parameters():
            if _ADAPTER.search(path):
                factor = _FACTOR.search(path)
                frozen = factor is not None and self._adapters.get(factor[2]) == factor[1].lower()
                parameter.requires_grad_(not frozen)

    def _fuse_layers(self) -> None:
        for module in self.module.modules():
            if isinstance(module, LoraLayer) and module not in self._fused:
                if can_fuse(module):
                    fuse(module, lambda: self._rows)
                    self._fused.add(module)
                else:
                    self._unfused = True

    @property
    def shareable(self) -> bool:
        """Whether rows of several adapters can go through the model together."""
        return not self._unfused

    @contextmanager
    def computing(
        self, *adapters: str | None, counts: tuple[int, ...] = (), grads: GradRows | None = None
    ) -> Iterator[None]:
        """Within it the model computes with these adapters, one for each block of ``counts`` rows.

        Args:
            adapters: names; ``None`` alone is a base without adapters.
            counts: rows of each block; not needed for a single adapter.
            grads: where the backward pass leaves per-sample gradients; ``None`` leaves gradients to autograd.
        """
        names = tuple(a for a in adapters if a is not None)
        if self._unfused and names:
            self._switch(names[0])
        before = self._rows
        self._rows = Rows(names, counts, grads) if names else None
        try:
            yield
        finally:
            self._rows = before

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Within it the model computes without any adapter, also where there are some."""
        before = self._rows
        self._rows = Rows((_NO_ADAPTER,))
        try:
            if self._peft is None or not self._unfused:
                yield
                return
            try:
                with self._peft.disable_adapter():
                    yield
            finally:  # PEFT trains the active adapter alone when it is back
                self._switched = None
                self._keep_as_configured()
        finally:
            self._rows = before

    def remove(self, name: str) -> None:
        """Take an adapter off; with the last one the base is as it was."""
        if name not in self._adapters:
            return
        del self._adapters[name]
        self._switched = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft names the adapter it switches to
            self._peft.delete_adapter(name)
            self._keep_as_configured()
            if not self._adapters:
                self._peft.unload()
                self._peft = None
                self._fused.clear()
                self._unfused = False

    def _adaptable_names(self) -> list[str]:
        names = {path.rsplit(".", 1)[-1] for path, module in self._modules.items() if isinstance(module, _ADAPTABLE)}
        return sorted(names)

    def _resolve(self, targets: Sequence[str] | str) -> list[str]:
        """Full paths of the modules that the configured names mean."""
        if targets == "all-linear":
            return [path for path, m in self._modules.items() if isinstance(m, _LINEAR) and path != self._output]
        resolved: list[str] = []
        for target in targets:
            if target in GROUPS:
                resolved.extend(p for p in self._group(target) if p not in resolved)
                continue
            paths = [p for p in self._modules if p == target or p.endswith("." + target)]
            if not paths or not all(isinstance(self._modules[p], _ADAPTABLE) for p in paths):
                problem = "cannot carry an adapter" if paths else "does not exist"
                names = self._adaptable_names()
                raise InvalidRequestError(
                    f"target module {target!r} {problem} in {self.loaded.name}; it has {', '.join(names)}, "
                    "or use 'all-linear' or one of " + ", ".join(GROUPS),
                    field="lora_config.target_modules",
                    constraint="one of: " + ", ".join(names),
                )
            resolved.extend(p for p in paths if p not in resolved)
        return resolved

    def _group(self, group: str) -> list[str]:
        """Full paths of a group's modules.

        Raises:
            InvalidRequestError: this model has none.
        """
        paths = [
            p for p, m in self._modules.items() if isinstance(m, _LINEAR) and _group_of(p, self._output) == group
        ]
        if not paths:
            raise InvalidRequestError(
                f"{self.loaded.name} has no linear layers that {group} would mean; name its layers themselves: "
                + ", ".join(self._adaptable_names()),
                field="lora_config.target_modules",
                constraint="layers of this model",
            )
        return paths

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


def _group_of(path: str, output: str) -> str | None:
    """Which group of layers a linear module belongs to, by the names on its path."""
    if path == output:
        return "@unembed"
    *parents, leaf = path.split(".")
    if any(_ATTENTION.search(part) for part in parents):
        return "@attention"
    if leaf in _ROUTERS:
        return None
    return "@mlp" if leaf in ("fc1", "fc2") or any(_MLP.search(part) for part in parents) else None


def own_parameters(module: nn.Module, adapter: str | None) -> dict[str, nn.Parameter]:
    """Parameters of a run's state, under names that do not depend on the adapter's, sorted: those that it trains, and
    a frozen factor. For adapters the names are those of PEFT's own files.
    """
    found = {}
    for name, parameter in module.named_parameters():
        owner = _ADAPTER.search(name)
        own = parameter.requires_grad if owner is None else owner[1] == adapter
        if not own:
            continue
        if adapter is not None:
            name = "base_model.model." + re.sub(rf"\.{adapter}(?=\.|$)", "", name)  # noqa: PLW2901
        found[name] = parameter
    return dict(sorted(found.items()))


def trainable_parameters(module: nn.Module, adapter: str | None) -> dict[str, nn.Parameter]:
    """Those of them that the run trains."""
    return {name: p for name, p in own_parameters(module, adapter).items() if p.requires_grad}


def fused_parameters(module: nn.Module, adapter: str | None) -> frozenset[str]:
    """Names, as above, of the parameters with the fused per-sample rule."""
    if adapter is None:
        return frozenset()
    layers: list[Any] = [m for m in module.modules() if can_fuse(m) and adapter not in cast(Any, m).lora_variant]
    owned = {id(part[adapter].weight) for m in layers for part in (m.lora_A, m.lora_B) if adapter in part}
    return frozenset(name for name, p in trainable_parameters(module, adapter).items() if id(p) in owned)

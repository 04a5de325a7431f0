"""Adapters that a worker holds: copies of weights as they were when a request began.

A copy goes over as PEFT's two files in a private folder of a file system in memory, and the folder is gone as soon as
the worker has answered: nothing of it reaches a disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from tg_tinker_server.engine.lora import own_parameters
from tg_tinker_server.engine.sampling.torch_weights import TorchWeights
from tg_tinker_server.engine.vllm.process import Message
from tg_tinker_server.engine.vllm.settings import MEMORY_FOLDER, MOST_ADAPTERS, MOST_RANK
from tg_tinker_server.engine.vllm.trials import Trial

_PLAIN = re.compile(r"base_model\.model\.(.+)\.lora_[AB]\.weight")
_PREFIX = "tg-tinker-adapter-"
_numbers = itertools.count(1)  # never used twice: vLLM remembers prompts by them


def not_plain(weights: TorchWeights) -> str | None:
    """Why vLLM could not compute with an adapter; ``None``: it can, or there is none."""
    layers = _layers(weights)
    if layers is None:
        return "trained parameters that are no low-rank factors of linear layers"
    if any(layer.r[weights.adapter] > MOST_RANK for layer in layers.values()):
        return f"a rank above {MOST_RANK}"
    return None


def _layers(weights: TorchWeights) -> dict[str, Any] | None:
    """The adapter's layers by path; ``None`` if it holds anything but factors of linear layers."""
    module, adapter = weights.base.module, weights.adapter
    if adapter is None:
        return {}
    layers: dict[str, Any] = {}
    for name in own_parameters(module, adapter):
        match = _PLAIN.fullmatch(name)
        layer: Any = module.get_submodule(match[1]) if match else None
        if not isinstance(layer, LoraLayer) or type(layer.get_base_layer()) is not nn.Linear:
            return None
        if adapter in layer.lora_variant or layer.lora_bias.get(adapter):
            return None
        layers[cast(Any, match)[1]] = layer
    return layers


def write_adapter(weights: TorchWeights, folder: Path) -> None:
    """Write an adapter as PEFT's files: ``adapter_model.safetensors`` (float32) and ``adapter_config.json``.

    Raises:
        OSError: they could not be written.
    """
    layers, adapter = _layers(weights), weights.adapter
    assert layers
    own = own_parameters(weights.base.module, adapter)
    tensors = {name: p.detach().to("cpu", torch.float32, copy=True).contiguous() for name, p in own.items()}
    first = next(iter(layers.values()))
    rank = first.r[adapter]
    config = {
        "base_model_name_or_path": weights.base.loaded.name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": first.scaling[adapter] * rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(layers),
        "task_type": "CAUSAL_LM",
    }
    try:
        save_file(tensors, folder / "adapter_model.safetensors")
    except SafetensorError as e:
        raise OSError("the adapter could not be written") from e
    (folder / "adapter_config.json").write_text(json.dumps(config))


class PrivateFolder:
    """A folder that only this user can open, locked as long as this process lives and needs it."""

    def __init__(self, memory: Path) -> None:
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=memory))
            try:
                self._lock = os.open(self.path, os.O_RDONLY)
            except FileNotFoundError:  # a server that started just now took it for one of a dead process
                continue
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            if self.path.exists():
                return
            os.close(self._lock)

    def remove(self) -> None:
        """Delete it and what is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def sweep(memory: Path = MEMORY_FOLDER) -> None:
    """Delete this user's folders of processes that were killed before they could. A server does so when it starts."""
    for path in memory.glob(_PREFIX + "*"):
        with contextlib.suppress(OSError):  # somebody else's, or just deleted
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)  # a pipe would have us wait
            try:
                if os.fstat(lock).st_uid != os.geteuid():
                    continue
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


class Held:
    """One adapter that a worker has, or gets.

    Attributes:
        number: its name there.
        users: requests that have it.
        trial: what it must agree on before it is used.
        state: "loading" until it has.
        present: whether the worker holds it.
    """

    def __init__(self, weights: TorchWeights, folder: PrivateFolder) -> None:
        self.number = next(_numbers)
        self.weights, self.version = weights, weights.version
        self.folder: PrivateFolder | None = folder
        self.trial = Trial.of(weights)
        self.state: Literal["loading", "ready", "refused"] = "loading"
        self.present = False
        self.users = 0


class Adapters:
    """The adapters of one worker.

    Args:
        send: to the worker.
        memory: file system for the files.
        most: adapters that it can hold.
    """

    def __init__(
        self, send: Callable[[Message], None], *, memory: Path = MEMORY_FOLDER, most: int = MOST_ADAPTERS
    ) -> None:
        self._send, self._memory, self._most = send, memory, most
        self._held: dict[int, Held] = {}  # those used last at the end

    def take(self, weights: TorchWeights) -> Held | None:
        """The adapter of these weights as they are now, for one more user; ``None``: no room until another's ends.

        Raises:
            OSError: the files could not be written.
        """
        for held in self._held.values():
            if held.weights is weights and held.version == weights.version:
                self._held[held.number] = self._held.pop(held.number)
                held.users += 1
                return held
        self._drop_unused(weights)
        idle = [h for h in self._held.values() if not h.users and h.state != "loading"]
        if len(self._held) >= self._most:
            if not idle:
                return None
            self._drop(idle[0])
        folder = PrivateFolder(self._memory)
        try:
            write_adapter(weights, folder.path)
            held = Held(weights, folder)
        except BaseException:
            folder.remove()
            raise
        weights.when_closed(self._drop_unused)
        self._held[held.number] = held
        held.users = 1
        self._send({"do": "load", "adapter": held.number, "path": str(folder.path)})
        return held

    def release(self, held: Held) -> None:
        """One user less. It stays as long as its weights are as they were."""
        held.users -= 1
        self._drop_unused(held.weights)

    @property
    def settled(self) -> bool:
        """Whether none is on its way, or on trial."""
        return all(held.state != "loading" for held in self._held.values())

    def answered(self, number: int, *, refused: bool) -> Held:
        """The worker has loaded it, or will not."""
        held = self._held[number]
        held.present = not refused
        if held.folder is not None:
            held.folder.remove()
            held.folder = None
        if refused:
            self.tried(held, agrees=False)
        return held

    def tried(self, held: Held, *, agrees: bool) -> None:
        """The trial has ended."""
        held.state = "ready" if agrees else "refused"
        self._drop_unused(held.weights)

    def clear(self) -> None:
        """The worker has ended, and its adapters with it."""
        for held in self._held.values():
            if held.folder is not None:
                held.folder.remove()
                held.folder = None
        self._held.clear()

    def _drop_unused(self, weights: TorchWeights) -> None:
        """Let go of what nobody uses of weights that changed or were closed."""
        for held in list(self._held.values()):
            stale = weights.closed or held.version != weights.version
            if held.weights is weights and stale and not held.users and held.state != "loading":
                self._drop(held)

    def _drop(self, held: Held) -> None:
        del self._held[held.number]
        if held.present:
            self._send({"do": "drop", "adapter": held.number})

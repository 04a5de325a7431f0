"""Adapters as PEFT writes them: a folder with a configuration and a safetensors file. Pickles are not opened."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from tg_tinker.errors import InvalidRequestError
from tg_tinker.tensor_file import FormatError, parse_object, read_tensors
from tg_tinker.types import LoRAConfig
from tg_tinker.types.federation import LARGEST_WEIGHTS_BYTES

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter.safetensors")
_LARGEST_CONFIG = 1 << 20
# What changes how an adapter is applied, and the value that leaves it plain LoRA.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (None, False),
    "use_rslora": (None, False),
    "use_qalora": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "fan_in_fan_out": (None, False, True),
    "target_parameters": (None, []),
    "lora_bias": (None, False),
    "exclude_modules": (None, []),
}


def read_adapter(folder: Path) -> tuple[dict[str, npt.NDArray[np.float32]], LoRAConfig, str]:
    """The tensors as float32, the settings, and the SHA-256 of the file of weights, hex.

    Raises:
        InvalidRequestError: a file is missing or damaged, or the adapter is not plain LoRA.
    """
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None or not (folder / CONFIG).is_file():
        raise _refuse(f"{folder} has no {CONFIG} with {' or '.join(WEIGHTS)}; pickles are not opened")
    if path.stat().st_size > LARGEST_WEIGHTS_BYTES or (folder / CONFIG).stat().st_size > _LARGEST_CONFIG:
        raise _refuse(f"the files of {folder} are too large for an adapter")
    try:
        settings = parse_object((folder / CONFIG).read_text())
        data = path.read_bytes()
        found, _ = read_tensors(memoryview(data))
    except (FormatError, ValueError, OSError) as e:
        raise _refuse(f"the adapter in {folder} cannot be read: {e}") from e
    if not all(array.dtype.kind == "f" for array in found.values()):
        raise _refuse(f"{path.name} holds what is no float16, float32 or float64")
    tensors = {name: array.astype(np.float32) for name, array in found.items()}
    return tensors, _settings(settings), hashlib.sha256(data).hexdigest()


def _settings(config: dict[str, Any]) -> LoRAConfig:
    for name, plain in _PLAIN.items():
        if config.get(name, plain[0]) not in plain:
            raise _refuse(f"{name}={config[name]!r} in {CONFIG} is not offered; plain LoRA is")
    targets = config.get("target_modules")
    try:
        return LoRAConfig(
            rank=config.get("r", 8),
            alpha=config.get("lora_alpha", 8),
            dropout=config.get("lora_dropout", 0.0),
            target_modules=targets if targets == "all-linear" else sorted(targets or []),
            bias=config.get("bias", "none"),
            modules_to_save=config.get("modules_to_save") or [],
        )
    except (ValidationError, TypeError) as e:
        raise _refuse(f"{CONFIG} cannot be: {e}") from e


def _refuse(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, field="folder", constraint="an adapter as PEFT writes it")

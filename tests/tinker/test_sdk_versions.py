"""The unmodified Tinker SDK, in each supported version, does everything a script may do against one server."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from tests.support.hub_folders import CHAT, build
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig

NEWEST = "0.38.0"
OLDER = ("0.30.4", "0.34.0", "0.36.0")
SESSION = Path(__file__).with_name("sdk_session.py")
PEERS = Path(sys.prefix) / "peers"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    folder = tmp_path_factory.mktemp("hub")
    config = ServerConfig(
        port=0, tinker_port=0, data_dir=folder / "data", backend="torch", device="cpu", models=build(folder)
    )
    with EmbeddedServer(config) as running:
        yield running


def environment(version: str) -> dict[str, str]:
    """Of a process that imports this version of the SDK and nothing of ours."""
    path = PEERS / f"tinker-{version}"
    if version != NEWEST and not (path / "tinker" / "__init__.py").exists():
        pytest.fail(f"the Tinker SDK {version} is not at {path}; install it: python scripts/make_venv.py peers")
    return {
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", ""),
        "PYTHONPATH": "" if version == NEWEST else str(path),
        "HF_HUB_OFFLINE": "1",
        "TINKER_TELEMETRY": "0",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def test_the_newest_sdk_is_the_one_that_is_installed() -> None:
    assert metadata.version("tinker") == NEWEST


@pytest.mark.parametrize("version", [*OLDER, NEWEST])
def test_everything_a_script_may_do(version: str, server: EmbeddedServer, tmp_path: Path) -> None:
    command = [sys.executable, str(SESSION), server.tinker_url, "tml-" + server.mint_key(tenant=f"v{version}"), CHAT]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(version), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["version"] == version
    assert set(seen["losses"]) == {
        "cross_entropy",
        "grad_norm",
        "importance_sampling",
        "ppo",
        "cispo",
        "dro",
        "gspo",
    }
    assert all(math.isfinite(value) for value in seen["losses"].values())
    assert seen["losses"]["grad_norm"] > 0
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(seen["files"])
    assert seen["loss_on_server"] == (version in ("0.36.0", NEWEST)), "older ones have no create_custom_loss"

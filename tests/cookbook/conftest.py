"""Recipes of the Tinker cookbook as their authors ship them: processes of their own, without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.hub_folders import build
from tg_tinker import ServiceClient
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.service.policy import KeyPolicy

NOWHERE = "http://127.0.0.1:9"  # whatever looks for the network finds a closed door


@dataclass(frozen=True)
class Cookbook:
    """Runs recipes against one server, in a folder that looks like the hub."""

    server: EmbeddedServer
    hub: Path

    def run(self, recipe: str, log_path: Path, key: str, **options: Any) -> list[dict[str, Any]]:
        """Run a recipe to its end and read the metrics file that it wrote.

        ``__`` in the name of an option stands for a dot.
        """
        command = _command(recipe, log_path, options)
        started = time.monotonic()
        done = subprocess.run(
            command,
            cwd=self.hub,
            env=self._environment(key, log_path.parent),
            capture_output=True,
            text=True,
            timeout=1100,
            check=False,
        )
        print(f"{recipe}: {time.monotonic() - started:.0f} s")
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        return self.metrics(log_path)

    def kill_after(self, recipe: str, log_path: Path, key: str, *, lines: int, **options: Any) -> None:
        """Start a recipe and kill it, as a power cut would, once its metrics file has so many lines."""
        process = subprocess.Popen(
            _command(recipe, log_path, options),
            cwd=self.hub,
            env=self._environment(key, log_path.parent),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            while len(self.metrics(log_path)) < lines:
                assert process.poll() is None, f"{recipe} ended before it could be killed"
                time.sleep(0.02)
        finally:
            process.kill()
            process.wait()

    def metrics(self, log_path: Path) -> list[dict[str, Any]]:
        """What a recipe wrote so far, whole lines only."""
        path = log_path / "metrics.jsonl"
        written = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in written.splitlines(keepends=True) if line.endswith("\n")]

    def key(self, tenant: str = "default", **policy: Any) -> str:
        """A key; with anything said about privacy, one that is bound to that policy."""
        if not policy:
            return self.server.mint_key(tenant)
        return self.server.mint_key(tenant, policy=KeyPolicy(**policy))

    def credentials(self, key: str) -> dict[str, str]:
        """What the Tinker SDK is told."""
        return {"base_url": self.server.tinker_url, "api_key": "tml-" + key}

    def steps_in_ledger(self, tenant: str, dataset_id: str) -> int:
        """How many releases the ledger of a dataset holds, each paid for and each settled."""
        client = ServiceClient(api_key=self.server.mint_key(tenant, ("auditor",)), base_url=self.server.address)
        kinds = [(e.kind, e.body.get("outcome")) for e in client.get_privacy_ledger(dataset_id).entries]
        assert kinds.count(("settle", "released")) == sum(1 for kind, _ in kinds if kind == "charge")
        return kinds.count(("settle", "released"))

    def _environment(self, key: str, scratch: Path) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(scratch),
            "TINKER_API_KEY": "tml-" + key,
            "TINKER_BASE_URL": self.server.tinker_url,
            "TINKER_TELEMETRY": "0",
            "HF_HOME": str(scratch / "hf"),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "http_proxy": NOWHERE,
            "https_proxy": NOWHERE,
            "no_proxy": "127.0.0.1,localhost",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }


def _command(recipe: str, log_path: Path, options: Mapping[str, Any]) -> list[str]:
    arguments = [f"{name.replace('__', '.')}={value}" for name, value in options.items()]
    return [sys.executable, "-m", f"tinker_cookbook.recipes.{recipe}", f"log_path={log_path}", *arguments]


@pytest.fixture(scope="session")
def cookbook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cookbook]:
    folder = tmp_path_factory.mktemp("hub")
    config = ServerConfig(
        port=0, tinker_port=0, data_dir=folder / "server", backend="torch", device="cpu", models=build(folder)
    )
    with EmbeddedServer(config) as server:
        yield Cookbook(server, folder)


def column(metrics: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """The values under a name, in order; lines without it left out."""
    return [float(line[name]) for line in metrics if name in line]

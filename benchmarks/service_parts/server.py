"""A server in a process of its own, so that its CPU time can be told from its clients'."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil
import torch

from tg_tinker import ServiceClient
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.foundation import Foundation


class ServerProcess:
    """`tg-tinker serve` on a free port of this machine; use it in a with statement.

    Args:
        folder: for its configuration and data.
        models: names -> folders, beside the bundled one.
        settings: more of its configuration.
    """

    def __init__(
        self,
        folder: Path,
        *,
        models: Mapping[str, Path] | None = None,
        settings: Mapping[str, str | int] | None = None,
    ) -> None:
        self._folder = folder
        values = {"port": 0, "data_dir": str(folder / "data"), "log_level": "error", **(settings or {})}
        lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
        lines += [
            "[models]",
            *(f"{json.dumps(name)} = {json.dumps(str(path))}" for name, path in (models or {}).items()),
        ]
        folder.mkdir(parents=True, exist_ok=True)
        self._config = folder / "server.toml"
        self._config.write_text("\n".join(lines) + "\n")
        foundation = Foundation.open(ServerConfig.load(self._config, environ={}))
        self._key = foundation.desk.mint("bench")
        foundation.db.close()

    def __enter__(self) -> Self:
        env = {k: v for k, v in os.environ.items() if not k.startswith("TG_TINKER_")}
        env["OMP_NUM_THREADS"] = str(torch.get_num_threads())
        with (self._folder / "server.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tg_tinker.cli", "serve", "--config", str(self._config)],
                env=env,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if found := re.match(r"tg-tinker serves on (\S+)", line):
                self.address = found[1]
                self._usage = psutil.Process(self._process.pid)
                return self
        raise RuntimeError(f"the server did not start: {(self._folder / 'server.log').read_text()[-2000:]}")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.communicate(timeout=20)
        self._process.kill()
        self._process.wait()

    def client(self) -> ServiceClient:
        """A new connection."""
        return ServiceClient(api_key=self._key, base_url=self.address)

    def cpu_s(self) -> float:
        """CPU seconds of all its threads so far, in steps of a hundredth."""
        times = self._usage.cpu_times()
        return float(times.user + times.system)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Seconds per step: CPU of the server, CPU of this process, the clock."""

    server_cpu_s: float
    own_cpu_s: float
    wall_s: float


def measured(work: Callable[[], object], *, steps: int, server: ServerProcess) -> Cost:
    """Do ``work``, which takes so many steps."""
    server_s, own_s, wall_s = server.cpu_s(), time.process_time(), time.perf_counter()
    work()
    wall_s, own_s, server_s = time.perf_counter() - wall_s, time.process_time() - own_s, server.cpu_s() - server_s
    return Cost(server_cpu_s=server_s / steps, own_cpu_s=own_s / steps, wall_s=wall_s / steps)

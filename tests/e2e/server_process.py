"""A real server in a process of its own, to be killed and started again on the same port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from tg_tinker import ServiceClient
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.foundation import Foundation


def free_port() -> int:
    """A loopback port nobody listens on right now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class ServerProcess:
    """`tg-tinker serve` as a child process."""

    def __init__(self, folder: Path, *, backend: str = "bigram", settings: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.port = free_port()
        self.settings = {"BACKEND": backend, **(settings or {})}
        self.process: Any = None  # of ``subprocess``, or what can be used like it
        foundation = Foundation.open(ServerConfig(data_dir=folder))
        self.key = foundation.desk.mint("tenant-a")
        self.other_key = foundation.desk.mint("tenant-b")
        foundation.db.close()

    def start(self) -> ServerProcess:
        env = {"OMP_NUM_THREADS": "1", "TG_TINKER_SERVER_PORT": str(self.port)}
        env |= {"TG_TINKER_SERVER_DATA_DIR": str(self.folder)}
        env |= {f"TG_TINKER_SERVER_{k}": v for k, v in self.settings.items()}
        self.process = self._begin(env, self.folder / "server.log")
        return self

    def _begin(self, settings: dict[str, str], log: Path) -> Any:
        """A process that serves, with these environment variables more; what it prints is added to the log."""
        with log.open("ab") as file:
            command = [sys.executable, "-m", "tg_tinker.cli", "serve"]
            return subprocess.Popen(command, env={**os.environ, **settings}, stdout=file, stderr=file)

    def wait_until_up(self, timeout_s: float = 300.0) -> ServerProcess:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with socket.socket() as s:
                s.settimeout(0.2)
                if s.connect_ex(("127.0.0.1", self.port)) == 0:
                    return self
            assert self.process is not None
            if self.process.poll() is not None:
                raise AssertionError(f"server ended: {(self.folder / 'server.log').read_text()[-2000:]}")
            time.sleep(0.02)
        raise AssertionError("server did not come up")

    def kill(self) -> None:
        """SIGKILL: no chance to tidy up."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def terminate(self) -> int:
        """SIGTERM, as an operator would."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return int(self.process.wait(timeout=300))

    def client(self, key: str | None = None, **options: float) -> ServiceClient:
        return ServiceClient(api_key=key or self.key, base_url=f"127.0.0.1:{self.port}", **options)

    def __enter__(self) -> ServerProcess:
        return self.start().wait_until_up()

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()


def batch(seed: int, records: int = 4, tokens: int = 12, vocab: int = 256) -> dict[str, np.ndarray]:
    """A reproducible batch of token ids."""
    return {"input_ids": np.random.default_rng(seed).integers(1, vocab, (records, tokens))}

"""A real server whose process begins with everything imported: killed often, it is back at once, also where the
processor is busy. Otherwise forty starts are forty times the seconds that imports take.
"""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

from tests.e2e.server_process import ServerProcess
from tg_tinker.cli import main

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tg_tinker.cli", "tg_tinker_server.cli", "tg_tinker_server.app"])


def _serve(settings: dict[str, str], log: Path) -> None:
    """``tg-tinker serve``, in a process of its own."""
    os.environ.update(settings)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    main(["serve"])


class _Fork:
    """As much of ``subprocess.Popen`` as a ``ServerProcess`` uses."""

    def __init__(self, settings: dict[str, str], log: Path) -> None:
        self._process = _FORKS.Process(target=_serve, args=(settings, log), daemon=True)
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        assert self._process.exitcode is not None
        return self._process.exitcode


class ForkedServer(ServerProcess):
    """``tg-tinker serve``, forked from a process that has imported what it needs and done nothing else."""

    def _begin(self, settings: dict[str, str], log: Path) -> _Fork:
        return _Fork(settings, log)

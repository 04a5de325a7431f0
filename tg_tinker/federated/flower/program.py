"""One of Flower's programs as a child process: with few rights, its words in a log file, stopped for certain."""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tg_tinker.errors import ServerError
from tg_tinker.federated.keys import read_secret, write_secret

_KEPT = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TZ",
    "TMPDIR",
    "PYTHONPATH",
    "HTTPS_PROXY",
    "https_proxy",
    "NO_PROXY",
    "no_proxy",
)
_TERMINATE_S = 5.0
_LARGEST_LOG = 20 * 2**20
_LONGEST_REASON = 600
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class Program:
    """A program of Flower, started as a child of this process and ended with it.

    It gets a process group of its own, so that Ctrl-C reaches us first, and an environment without our secrets.

    Args:
        name: "superlink" or "supernode".
        arguments: of the command line. No secrets: every user of the computer can read them.
        state_dir: for its log and Flower's own files.
    """

    def __init__(self, name: str, arguments: Sequence[str], state_dir: Path) -> None:
        self.name = name
        self.log = state_dir / f"{name}.log"
        self._arguments = list(arguments)
        self._state_dir = state_dir
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    def start(self) -> None:
        """Start it; `said` is empty again.

        Raises:
            ServerError: the log or the process cannot be made.
        """
        self.stop()
        try:
            self._state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.log.exists() and self.log.stat().st_size > _LARGEST_LOG:
                self.log.replace(self.log.with_suffix(".log.1"))
            with self.log.open("ab") as log:
                self._log_start = log.tell()
                self._process = subprocess.Popen(  # noqa: S603 - this Python, with arguments made here
                    [
                        sys.executable,
                        "-m",
                        "tg_tinker.federated.flower.entry",
                        self.name,
                        str(os.getpid()),
                        *self._arguments,
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env=environment(self._state_dir),
                )
        except OSError as e:
            raise ServerError(f"cannot start flower-{self.name} in {self._state_dir}: {e.strerror}") from e

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """Its process, which leads a group of its own."""
        return self._process.pid if self._process else None

    def said(self) -> str:
        """Its words since it was started."""
        try:
            with self.log.open("rb") as log:
                log.seek(self._log_start)
                return log.read().decode("utf-8", errors="replace")
        except OSError:
            return ""

    def reason(self) -> str:
        """The last thing that it said, for an error message."""
        lines = [line.strip() for line in _COLOURS.sub("", self.said()).splitlines() if line.strip()]
        at = next((i for i, line in enumerate(lines) if "Exit Code" in line), max(len(lines) - 3, 0))
        text = " ".join(line for line in lines[at : at + 4] if "For more information" not in line)
        plain = "".join(c if c.isprintable() else " " for c in text)[:_LONGEST_REASON]
        return plain or "it said nothing"

    def stop(self) -> None:
        """End it and all that it started. Returns when they are gone."""
        process, self._process = self._process, None
        if process is None:
            return
        for number, patience in ((signal.SIGTERM, _TERMINATE_S), (signal.SIGKILL, _TERMINATE_S)):
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                break
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                continue
            deadline = time.monotonic() + 1.0
            while time.monotonic() < deadline and _exists(process.pid):
                time.sleep(0.02)
        process.wait()


def _exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def environment(state_dir: Path, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of Flower's programs: none of our keys, no calls home, nothing installed."""
    kept = {name: environ[name] for name in _KEPT if name in environ}
    return kept | {
        "FLWR_HOME": str(state_dir / "flwr-home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PYTHONUNBUFFERED": "1",
    }


def task_secret(path: Path) -> bytes:
    """The secret shared between a program and our executor, made on the first use.

    Raises:
        InvalidRequestError: others can read the file.
        ServerError: it cannot be written.
    """
    if not path.exists():
        write_secret(path, secrets.token_hex(32).encode("ascii"))
    return read_secret(path)


def is_free(host: str, port: int) -> bool:
    """Whether a program could listen there now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])

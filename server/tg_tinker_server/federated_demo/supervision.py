"""Commands of ours as children: their words in a log, stopped for certain, and missed when they end by themselves."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from tg_tinker.errors import ServerError

_LOOK_S = 0.05
_LAST_LINES = 5


class Child:
    """``tg-tinker <arguments>`` in a process group of its own, so that Ctrl-C reaches the demo first.

    Args:
        name: for people, e.g. "the clinic's server".
        log: everything that it says.
        environ: variables to set.
    """

    def __init__(self, name: str, arguments: Sequence[str], log: Path, environ: Mapping[str, str]) -> None:
        self.name, self.log = name, log
        with log.open("ab") as file:
            self._start = file.tell()
            self._process = subprocess.Popen(  # noqa: S603 - this Python, with arguments made here
                [sys.executable, "-m", "tg_tinker_server.federated_demo.child", str(os.getpid()), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **environ},
            )

    @property
    def pid(self) -> int:
        """Its process, which leads a group of its own."""
        return self._process.pid

    def said(self) -> str:
        """Its words since it was started."""
        with self.log.open("rb") as file:
            file.seek(self._start)
            return file.read().decode("utf-8", errors="replace")

    def check(self) -> None:
        """Require that it runs.

        Raises:
            ServerError: it ended; the message has its last words and names its log.
        """
        code = self._process.poll()
        if code is not None:
            last = " | ".join(line.strip() for line in self.said().splitlines()[-_LAST_LINES:] if line.strip())
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise ServerError(f"{self.name} {how}; the log is {self.log}. Its last words: {last or '(none)'}")

    def wait_for(self, pattern: str, timeout_s: float) -> re.Match[str]:
        """Wait until its words match.

        Raises:
            ServerError: it ended, or did not say so in time.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            found = re.search(pattern, self.said())
            if found is not None:
                return found
            self.check()
            if time.monotonic() > deadline:
                raise ServerError(f"{self.name} was not ready within {timeout_s:g} s; the log is {self.log}")
            time.sleep(_LOOK_S)

    def signal(self, number: int) -> None:
        """Send a signal to it and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def ended_within(self, timeout_s: float) -> bool:
        """Wait for its end."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True


def stop_all(children: Iterable[Child], *, patience_s: float) -> None:
    """Stop them together and wait until they are gone: SIGTERM, then SIGKILL."""
    waiting = list(children)
    for number, patience in ((signal.SIGTERM, patience_s), (signal.SIGKILL, patience_s)):
        for child in waiting:
            child.signal(number)
        deadline = time.monotonic() + patience
        waiting = [child for child in waiting if not child.ended_within(max(0.0, deadline - time.monotonic()))]
        if not waiting:
            return

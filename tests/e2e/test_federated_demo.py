"""The federated demo as processes: a whole run, Ctrl-C in the middle, a server that dies. Nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SCRIPT = """
import signal, sys
from pathlib import Path
from rich.console import Console
from tests.server.federated_demo.values import SMALL, TEXTS
from tg_tinker.errors import TGTinkerError
from tg_tinker_server.federated_demo.processes import ProcessStage
from tg_tinker_server.federated_demo.run import run

home = Path(sys.argv[1])
folder = home / "demo"
try:
    run(
        Console(width=110),
        lambda sites: ProcessStage(folder, sites, SMALL, backend="bigram"),
        home / "page.html",
        folder=folder, settings=SMALL, texts=TEXTS, in_process=False,
    )
except KeyboardInterrupt:
    print("interrupted", flush=True)
except TGTinkerError as e:
    print("error:", e.message, flush=True)
"""


class Running:
    """The demo in a process of its own, under a name that its children's command lines have too."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.printed: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", SCRIPT, str(home)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TG_TINKER_DATA_DIR": str(home / "user")},
        )

    def until(self, text: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.printed.append(line)
            if text in line:
                return
        raise AssertionError(f"the demo ended before {text!r}: {''.join(self.printed)}")

    def end(self) -> str:
        assert self.process.stdout is not None
        self.printed += list(self.process.stdout)
        self.process.wait(60)
        return "".join(self.printed)

    def children(self) -> set[int]:
        """Every process that comes of the demo, found by its parents or by its working files."""
        found = set()
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if str(self.home) in words and int(entry.name) != self.process.pid:
                found.add(int(entry.name))
        return found


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    demo = Running(tmp_path)
    yield demo
    demo.process.kill()
    demo.process.wait()
    assert demo.process.stdout is not None
    demo.process.stdout.close()


def test_the_demo_as_processes_ends_with_results_and_without_processes(running: Running) -> None:
    running.until("joined")
    # four servers, three sites, three SuperNodes, a SuperLink
    assert len(running.children()) == 11
    printed = running.end()
    assert running.process.returncode == 0, printed
    assert "round 2 of 2" in printed
    assert "NOT SO" not in printed
    assert "tg-tinker audit verify" in printed
    assert (running.home / "page.html").stat().st_size > 10_000
    assert not running.children()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_demo_leaves_no_process(running: Running, number: signal.Signals) -> None:
    running.until("joined")
    assert running.children()
    running.process.send_signal(number)
    running.end()
    assert ("interrupted\n" in running.printed) == (number == signal.SIGINT)
    if number == signal.SIGKILL:  # nobody stops them; they miss their parents
        deadline = time.monotonic() + 60
        while running.children() and time.monotonic() < deadline:
            time.sleep(0.2)
    assert not running.children()


def test_a_server_that_dies_is_named_with_its_log_and_everything_else_is_stopped(running: Running) -> None:
    running.until("joined")
    server = next(
        pid
        for pid in running.children()
        if "demo/coordinator/server" in (Path("/proc") / str(pid) / "cmdline").read_text()
    )
    os.kill(server, signal.SIGKILL)
    printed = running.end()
    assert "error: the server of coordinator was killed by SIGKILL; the log is" in printed
    assert "server.log" in printed
    assert not running.children()

"""Children of the demo: missed when they die, gone when they are stopped, gone when their parent is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tg_tinker.errors import ServerError
from tg_tinker_server.federated_demo.supervision import Child, stop_all


def server(folder: Path) -> Child:
    environ = {"TG_TINKER_SERVER_BACKEND": "bigram", "TG_TINKER_SERVER_DRAIN_S": "1"}
    return Child("the server", ["serve", "--data-dir", str(folder / "data"), "--port", "0"], folder / "log", environ)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_child_is_waited_for_missed_when_it_dies_and_named_with_its_log(tmp_path: Path) -> None:
    child = server(tmp_path)
    try:
        assert child.wait_for(r"serves on 127\.0\.0\.1:(\d+)", 60).group(1).isdigit()
        child.check()
        os.kill(child.pid, signal.SIGKILL)
        assert child.ended_within(10)
        with pytest.raises(ServerError, match=r"the server was killed by SIGKILL; the log is .*log"):
            child.check()
    finally:
        stop_all([child], patience_s=1)


def test_a_child_that_cannot_start_is_reported_with_its_last_words(tmp_path: Path) -> None:
    child = Child("the server", ["serve", "--backend", "abacus"], tmp_path / "log", {})
    with pytest.raises(ServerError, match=r"ended with exit code 2; .*abacus"):
        child.wait_for("never said", 60)


def test_what_does_not_end_when_asked_is_killed(tmp_path: Path) -> None:
    stubborn = Child("it", [], tmp_path / "log", {})
    stubborn.ended_within(30)
    stubborn._process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import signal,time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert stubborn._process.stdout is not None
    stubborn._process.stdout.readline()
    started = time.monotonic()
    stop_all([stubborn], patience_s=0.3)
    assert time.monotonic() - started < 30
    assert stubborn._process.returncode == -signal.SIGKILL
    stubborn._process.stdout.close()


def test_children_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import time; from pathlib import Path\n"
            "from tests.server.federated_demo.test_supervision import server\n"
            f"print(server(Path({str(tmp_path)!r})).pid, flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 30
    while not gone(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert gone(child)

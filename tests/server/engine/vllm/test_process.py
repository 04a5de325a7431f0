"""A worker on a pipe: it ends with whoever started it, and tells nothing to anybody else."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.server.engine.vllm.conftest import TOY
from tests.server.engine.vllm.test_sampler import is_alive, stop, wait_until
from tg_tinker_server.engine.vllm.process import WorkerProcess

SAMPLE = {
    "do": "sample",
    "id": "0",
    "prompt": [3],
    "params": {"max_tokens": 2, "temperature": 0, "logprobs": 0, "stop_token_ids": []},
    "adapter": None,
    "salt": "s",
}
_PARENT = """
import sys, threading, time
from tg_tinker_server.engine.vllm.process import WorkerProcess
worker = WorkerProcess([sys.executable, sys.argv[1]], {}, {}, threading.Event())
while not worker.receive():
    time.sleep(0.01)
print(worker.pid, flush=True)
time.sleep(600)
"""


def started(program: str | Path, **environ: str) -> tuple[WorkerProcess, threading.Event]:
    arrived = threading.Event()
    command = [sys.executable, str(program)] if isinstance(program, Path) else [sys.executable, "-c", program]
    return WorkerProcess(command, environ, {}, arrived), arrived


def heard(worker: WorkerProcess, arrived: threading.Event, until: str) -> list[dict]:
    """Everything up to a message of this kind."""
    messages: list[dict] = []
    while not any(until in m for m in messages):
        assert arrived.wait(60)
        arrived.clear()
        messages += worker.receive()
    return messages


def test_messages_come_in_order_and_wake_whoever_waits():
    worker, arrived = started(TOY)
    assert heard(worker, arrived, "ready") == [{"ready": "toy"}]
    worker.send(SAMPLE)
    first, last = heard_all(worker, arrived, 2)
    assert (first["ended"], last["ended"]) == (False, True)
    worker.close()


def heard_all(worker, arrived, count):
    messages = []
    while len(messages) < count:
        assert arrived.wait(60)
        arrived.clear()
        messages += worker.receive()
    return messages


def test_a_worker_ends_with_a_parent_that_is_killed(tmp_path):
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, str(TOY)], stdout=subprocess.PIPE, env=environ)
    pid = int(parent.stdout.readline())
    assert is_alive(pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not is_alive(pid))
    parent.stdout.close()


def test_one_that_does_not_end_by_itself_is_ended_with_what_it_started():
    program = (
        "import subprocess, sys, time, json\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(json.dumps({'ready': child.pid}), flush=True)\n"
        "time.sleep(600)\n"
    )
    worker, arrived = started(program)
    (child,) = (m["ready"] for m in heard(worker, arrived, "ready"))
    assert is_alive(child)
    worker.close(patience_s=0.1)
    assert not is_alive(worker.pid)
    wait_until(lambda: not is_alive(child))
    worker.close()  # twice is no error


def test_last_words_are_kept_of_one_that_never_was_ready():
    worker, arrived = started("import sys; sys.stderr.write('x' * 5000 + 'no such model'); sys.exit(3)")
    (gone,) = heard(worker, arrived, "gone")
    assert gone["gone"] == 3
    assert gone["words"].endswith("no such model")
    assert len(gone["words"]) == 2000
    worker.send(SAMPLE)  # to nobody
    worker.close()


def test_nothing_is_kept_of_what_one_prints_while_it_has_prompts():
    program = (
        "import sys, time\n"
        "sys.stderr.write('loading'); sys.stderr.flush(); time.sleep(0.2)\n"
        "print('{\"ready\": 1}', flush=True); time.sleep(0.2)\n"
        "sys.stderr.write('a prompt: secret'); sys.stderr.flush()\n"
        "sys.exit(1)\n"
    )
    worker, arrived = started(program)
    gone = heard(worker, arrived, "gone")[-1]
    assert gone == {"gone": 1, "words": ""}
    worker.close()


def test_what_is_no_protocol_ends_the_worker():
    worker, arrived = started("import time; print('hello', flush=True); time.sleep(600)")
    gone = heard(worker, arrived, "gone")[-1]
    assert gone["gone"] == -signal.SIGKILL
    worker.close()


def test_a_worker_that_reads_nothing_holds_nobody_up():
    worker, _ = started("import time; time.sleep(600)")
    begun = time.monotonic()
    for _ in range(50):
        worker.send(SAMPLE | {"prompt": [1] * 100_000})
    assert worker.receive() == []
    worker.close(patience_s=0.1)
    assert not is_alive(worker.pid)
    assert begun  # no figure: it returned at all


def test_the_folder_of_an_adapter_goes_with_a_worker_that_was_killed_before_it_read_it(tmp_path):
    worker, arrived = started(TOY)
    heard(worker, arrived, "ready")
    stop(worker.pid)
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"secret")
    worker.send({"do": "load", "adapter": 1, "path": str(folder)})
    os.kill(worker.pid, signal.SIGKILL)
    heard(worker, arrived, "gone")
    assert not folder.exists()


def test_closing_does_not_wait_for_what_cannot_be_killed(monkeypatch):
    worker, arrived = started(TOY)
    heard(worker, arrived, "ready")
    stop(worker.pid)
    kill = worker._kill
    monkeypatch.setattr(worker, "_kill", lambda: None)
    worker.close(patience_s=0.1)
    assert is_alive(worker.pid)
    kill()
    heard(worker, arrived, "gone")

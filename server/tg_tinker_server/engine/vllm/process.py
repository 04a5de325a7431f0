"""A worker process on a pipe: started, spoken with in lines of JSON, and ended.

To the worker: its options first; then ``{"do": "load", "adapter", "path"}``, ``{"do": "drop", "adapter"}``,
``{"do": "sample", "id", "prompt", "params", "adapter", "salt"}`` and ``{"do": "cancel", "ids"}``. From it: first
``{"ready": version}`` or ``{"failed": why, "unsupported": bool}``; then ``{"adapter"}``, with ``"error"`` if it was
not loaded, and of sequences ``{"id", "tokens", "logprobs", "ended", "hits"}`` or ``{"id", "error"}``; where it broke,
``{"broken": where}`` is its last. This end adds ``{"gone": exit status, "words": end of what it printed before it was
ready}`` when the process has ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import IO, Any

Message = dict[str, Any]
_KEPT_WORDS = 2000
_FOLDERS = 64  # more than can be on their way to a worker


class WorkerProcess:
    """One worker under way. No call waits for it but ``close``.

    What it prints is kept, in memory, until it is ready; afterwards it might hold somebody's tokens and is dropped.

    Args:
        command: program and arguments.
        environ: all of its environment.
        options: the first message.
        arrived: set whenever it has said something.

    Raises:
        OSError: the program cannot be started.
    """

    def __init__(
        self, command: Sequence[str], environ: Mapping[str, str], options: Message, arrived: threading.Event
    ) -> None:
        self._arrived = arrived
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._words = b""
        self._folders: deque[str] = deque(maxlen=_FOLDERS)
        self._ready = self._closed = False
        # A session of its own: Ctrl-C is for the server, which lets running work end first.
        self._process = subprocess.Popen(  # noqa: S603 - what the operator configured
            list(command),
            env=dict(environ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._threads = [
            threading.Thread(target=target, name="vllm-pipe", daemon=True)
            for target in (self._write, self._read, self._listen)
        ]
        for thread in self._threads:
            thread.start()
        self.send(options)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def send(self, message: Message) -> None:
        """Hand a message over. One to a worker that has ended is dropped. The folder of an adapter to be loaded is
        deleted by the worker when it has read it, and here when the worker has ended.
        """
        if message.get("do") == "load":
            self._folders.append(message["path"])
        self._outbox.put(message)

    def receive(self) -> list[Message]:
        """What it has said since the last call, in order; after ``gone`` there is nothing more."""
        messages = []
        with contextlib.suppress(queue.Empty):
            while True:
                messages.append(self._inbox.get_nowait())
        return messages

    def close(self, patience_s: float = 2.0) -> None:
        """End it: by closing its stdin, and if that takes longer than ``patience_s`` seconds, by force."""
        if self._closed:
            return
        self._closed = True
        self._outbox.put(None)
        try:
            self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # deep in a driver; the reading thread waits on
                self._process.wait(patience_s)
        for thread in self._threads:
            thread.join(patience_s)

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _write(self) -> None:
        pipe = _open(self._process.stdin)
        try:
            while (message := self._outbox.get()) is not None:
                pipe.write(json.dumps(message).encode() + b"\n")
                pipe.flush()
        except OSError:
            pass  # it has ended, which the reading thread tells
        with contextlib.suppress(OSError):
            pipe.close()

    def _read(self) -> None:
        try:
            for line in _open(self._process.stdout):
                message = json.loads(line)
                if "ready" in message:
                    self._ready, self._words = True, b""
                self._inbox.put(message)
                self._arrived.set()
        except ValueError:
            self._kill()  # not our protocol: nothing that follows could be trusted
        status = self._process.wait()
        self._kill()  # processes that it may have started
        for path in tuple(self._folders):
            shutil.rmtree(path, ignore_errors=True)
        self._outbox.put(None)
        if not self._ready:
            self._threads[2].join(1.0)  # its last words
        self._inbox.put({"gone": status, "words": self._words.decode("utf-8", "replace")})
        self._arrived.set()

    def _listen(self) -> None:
        pipe = _open(self._process.stderr)
        while words := os.read(pipe.fileno(), 2**16):
            if not self._ready:
                self._words = (self._words + words)[-_KEPT_WORDS:]


def _open(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe

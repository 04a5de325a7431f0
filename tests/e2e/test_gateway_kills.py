"""The Tinker door of a real server process that is killed at random while requests come doubled and out of order."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.e2e.forked_server import ForkedServer
from tests.e2e.server_process import ServerProcess, free_port
from tests.server.gateway.conftest import Raw, config
from tg_tinker_server.app import EmbeddedServer

ROWS = ([1, 2, 3, 4], [4, 3, 2], [9, 9, 8, 7, 6], [5, 1, 5])
KILLS = pytest.mark.parametrize("kills", [2, pytest.param(40, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
PRIVATE = {"type": "dp_adamw", "target_epsilon": 1e4, "noise_multiplier": 1.0, "dataset_id": "killed"}


class Patient(Raw):
    """Sends again until there is an answer, as the SDK does."""

    def call(self, method: str, path: str, json: Any = None, **options: Any) -> httpx.Response:
        while True:
            try:
                response = super().call(method, path, json, **options)
            except httpx.TransportError:
                pass
            else:
                if response.status_code < 500 and response.status_code != 429:
                    return response
            time.sleep(0.05)


class Killer:
    """Kills the server at random moments until it did so often enough, each time on the same data."""

    def __init__(self, server: ServerProcess, kills: int, seed: int) -> None:
        self._server, self._left, self._random = server, kills, random.Random(seed)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work)

    @property
    def done(self) -> bool:
        return self._left == 0

    def _work(self) -> None:
        while self._left and not self._over.wait(self._random.uniform(0.02, 0.6)):
            self._server.kill()
            self._left -= 1
            self._server.start().wait_until_up()

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def one_step(client: Raw, model: str, n: int, rng: random.Random | None) -> None:
    """Two passes and a step; with a generator each request three times, from threads, in any order."""
    first = 3 * n + 1
    rows = [ROWS[(n + k) % len(ROWS)] for k in (0, 1)]
    sends = [
        lambda: client.train(model, first, rows[0]),
        lambda: client.train(model, first + 1, rows[1]),
        lambda: client.step(model, first + 2),
    ] * (3 if rng else 1)
    if rng is None:
        ids = [send() for send in sends]
    else:
        rng.shuffle(sends)
        with ThreadPoolExecutor(len(sends)) as threads:
            ids = list(threads.map(lambda send: send(), sends))
    for request_id in sorted(set(ids)):
        answer = client.retrieve(request_id)
        assert isinstance(answer, bytes) or "metrics" in answer, answer


def logprobs(client: Raw, model: str, seq: int) -> np.ndarray[Any, Any]:
    output = client.outputs(client.train(model, seq, *ROWS, forward_only=True))
    return np.frombuffer(output.loss_fn_outputs[0].fields["logprobs"].data, dtype="<f4")


def disturbed(server: ServerProcess, url: str, kills: int, optimizer: dict[str, Any] | None) -> tuple[Raw, str, int]:
    with httpx.Client(timeout=120) as http:
        client = Patient(url, server.key, http=http).open()
        model = client.create(**({"optimizer_config": optimizer} if optimizer else {}))
        rng, steps = random.Random(kills), 0
        with Killer(server, kills, seed=kills) as killer:
            while not killer.done or steps < 3:
                one_step(client, model, steps, rng)
                steps += 1
    return client, model, steps


@pytest.fixture
def server(tmp_path: Path):
    port = free_port()
    with ForkedServer(tmp_path, settings={"TINKER_PORT": str(port)}) as process:
        process.tinker_url = f"http://127.0.0.1:{port}"
        yield process


@KILLS
def test_the_weights_are_those_of_a_server_that_nobody_disturbed(server: Any, kills: int, tmp_path: Path) -> None:
    client, model, steps = disturbed(server, server.tinker_url, kills, None)
    with httpx.Client(timeout=120) as http:
        client.http = http
        found = logprobs(client, model, 3 * steps + 1)
    with EmbeddedServer(config(tmp_path / "calm")) as calm, httpx.Client(timeout=120) as http:
        other = Raw(calm.tinker_url, calm.mint_key(), http=http).open()
        twin = other.create()
        for n in range(steps):
            one_step(other, twin, n, None)
        np.testing.assert_allclose(found, logprobs(other, twin, 3 * steps + 1), rtol=0, atol=1e-6)


@KILLS
def test_each_step_is_released_once_and_none_unpaid(server: Any, kills: int) -> None:
    _, _, steps = disturbed(server, server.tinker_url, kills, PRIVATE)
    with server.client() as service:
        entries = service.get_privacy_ledger("killed").entries
    charged = Counter(e.body["seq"] for e in entries if e.body["kind"] == "charge")
    released = [e for e in entries if e.body["kind"] == "settle" and e.body["outcome"] == "released"]
    assert sorted(e.body["seq"] for e in released) == [3 * n + 3 for n in range(steps)]
    assert len({e.body["update_hash"] for e in released}) == steps  # noise was drawn anew for each
    assert set(charged) == {e.body["seq"] for e in released}
    assert charged.total() <= steps + kills  # a kill between charge and release costs one charge more, never less

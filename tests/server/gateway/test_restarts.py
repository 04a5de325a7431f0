"""What was acknowledged is done, once, whatever happens to the server in between."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.gateway.conftest import Raw, config, cross_entropy
from tg_tinker.errors import AuthorizationError
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.engine.bigram import BigramSession
from tg_tinker_server.gateway import training as training_module
from tg_tinker_server.store import tables as t


def _killed(server: EmbeddedServer) -> None:
    """End the server as a crash would: nothing is drained, nothing said."""
    loop, running = server._loop, server._server
    assert running is not None

    async def die() -> None:
        running._gateway._listener._server.force_exit = True  # type: ignore[union-attr]
        for task in asyncio.all_tasks():
            if task is not asyncio.current_task():
                task.cancel()

    asyncio.run_coroutine_threadsafe(die(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    server._thread.join()
    running._executors.close()
    running._foundation.db.close()
    for file in running._locks:
        file.close()


def _kept(server: EmbeddedServer) -> list[int]:
    return [
        s
        for (s,) in server._foundation.db.read(
            lambda tx: list(tx.execute(t.gateway_requests.select().with_only_columns(t.gateway_requests.c.seq)))
        )
    ]


def _loss(client: Raw, model: str, seq: int) -> float:
    return client.outputs(client.train(model, seq, [1, 2, 3], forward_only=True)).metrics["loss:sum"]


class Gate:
    """Holds the first operation of a kind until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        original: Callable[..., Any] = getattr(BigramSession, name)

        def held(session: BigramSession, *args: Any, **options: Any) -> Any:
            self.reached.set()
            self.open.wait(10)
            return original(session, *args, **options)

        monkeypatch.setattr(BigramSession, name, held)


def test_steps_that_were_acknowledged_before_a_crash_are_taken_once_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = EmbeddedServer(config(tmp_path / "whole")).start()
    client = Raw(whole.tinker_url, whole.mint_key()).open()
    model = client.create()
    for seq in (1, 3, 5):
        client.train(model, seq, [1, 2, 3])
        client.retrieve(client.step(model, seq + 1))
    expected = _loss(client, model, 7)
    whole.stop(1.0)

    first = EmbeddedServer(config(tmp_path / "broken")).start()
    client = Raw(first.tinker_url, first.mint_key()).open()
    model = client.create()
    client.train(model, 1, [1, 2, 3])
    client.retrieve(client.step(model, 2))
    gate = Gate(monkeypatch, "step")
    ids = {3: client.train(model, 3, [1, 2, 3])}
    ids[4] = client.step(model, 4)
    assert gate.reached.wait(10)
    ids[6] = client.step(model, 6)
    ids[5] = client.train(model, 5, [1, 2, 3])
    threading.Timer(0.2, gate.open.set).start()  # the crash comes while the step is taken
    _killed(first)

    second = EmbeddedServer(config(tmp_path / "broken")).start()
    client = Raw(second.tinker_url, client.key, session=client.session)
    try:
        assert client.retrieve(ids[6])["metrics"]["unclipped_grad_norm"] > 0
        assert isinstance(client.retrieve(ids[5], proto=True), bytes)
        assert client.step(model, 4) == ids[4]  # a client that was not sure asks again
        assert _loss(client, model, 7) == expected
        run = second._foundation.db.read(lambda tx: tx.execute(t.runs.select()).one())
        assert run.step == 3
        assert _wait_empty(second)
    finally:
        second.stop(1.0)


@pytest.mark.parametrize("wait_s", [20.0, 0.0])
def test_a_batch_larger_than_the_queue_is_whole_after_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_s: float
) -> None:
    rows = [[1 + n % 7, 2 + n % 5, 3] for n in range(24)]

    def train(client: Raw, model: str, n: int) -> None:
        client.outputs(client.train(model, n + 1, rows[n]))  # its result was delivered

    def patient(send: Callable[[], httpx.Response]) -> str:
        while (answer := send()).status_code == 429:
            threading.Event().wait(0.02)
        return str(answer.json()["request_id"])

    def stepped(client: Raw, model: str) -> tuple[float, float]:
        step = {"model_id": model, "seq_id": len(rows) + 1, "adam_params": {"learning_rate": 0.1}}
        norm = client.retrieve(patient(lambda: client.post("optim_step", step)))["metrics"]["unclipped_grad_norm"]
        after = cross_entropy(model, len(rows) + 2, [1, 2, 3], forward_only=True)
        return norm, client.outputs(patient(lambda: client.forward_backward(after))).metrics["loss:sum"]

    whole = EmbeddedServer(config(tmp_path / "whole")).start()
    client = Raw(whole.tinker_url, whole.mint_key()).open()
    model = client.create()
    for n in range(len(rows)):
        train(client, model, n)
    expected = stepped(client, model)
    whole.stop(1.0)

    first = EmbeddedServer(config(tmp_path / "broken", max_queue=2)).start()
    client = Raw(first.tinker_url, first.mint_key()).open()
    model = client.create()
    for n in range(len(rows)):
        train(client, model, n)
    _killed(first)
    monkeypatch.setattr(training_module, "RESUME_WAIT_S", wait_s)  # 0: clients come back until it is their turn
    second = EmbeddedServer(config(tmp_path / "broken", max_queue=2, tinker_gap_s=0.5)).start()
    client = Raw(second.tinker_url, client.key, session=client.session)
    try:
        assert stepped(client, model) == expected
    finally:
        second.stop(1.0)


def test_a_model_that_was_being_made_is_made_after_a_restart(tmp_path: Path) -> None:
    first = EmbeddedServer(config(tmp_path)).start()
    client = Raw(first.tinker_url, first.mint_key()).open()
    real = first._server._gateway._models._made  # type: ignore[union-attr]
    hang = asyncio.Event()

    async def never(*args: Any) -> Any:
        await hang.wait()
        return await real(*args)

    models = first._server._gateway._models  # type: ignore[union-attr]
    type(models)._made, original = never, type(models)._made
    try:
        body = {"session_id": client.session, "model_seq_id": 0, "base_model": "bigram", "lora_config": {"rank": 4}}
        request = client.ok("create_model", body)["request_id"]
        assert _kept(first) == [0]
        _killed(first)
    finally:
        type(models)._made = original
    with EmbeddedServer(config(tmp_path)) as second:
        client = Raw(second.tinker_url, client.key, session=client.session)
        assert client.retrieve(request)["model_id"] == f"{client.session}:train:0"
        assert client.create(0) == f"{client.session}:train:0"
        assert _wait_empty(second)
        assert len(second._foundation.db.read(lambda tx: tx.execute(t.runs.select()).all())) == 1


def test_what_a_key_sent_of_which_nothing_is_known_is_not_done(tmp_path: Path) -> None:
    with EmbeddedServer(config(tmp_path)) as server:
        callers = server._server._gateway._training.callers  # type: ignore[union-attr]
        key_id = server.mint_key().split("_")[1]

        def found(tenant: str, key: str) -> str:
            return asyncio.run_coroutine_threadsafe(callers.of(tenant, key), server._loop).result(10).key_id

        assert found("default", key_id) == key_id
        for tenant, key in (("default", "0" * 16), ("other", key_id)):
            with pytest.raises(AuthorizationError):
                found(tenant, key)


def test_requests_lie_encrypted_and_go_once_they_are_durable(tmp_path: Path) -> None:
    secret = b"a secret name"
    with EmbeddedServer(config(tmp_path)) as server:
        client = Raw(server.tinker_url, server.mint_key()).open()
        model = client.create()
        client.retrieve(client.train(model, 1, [1, 2, 3]), proto=True)
        assert _kept(server) == [1]  # its effect is in memory only
        client.retrieve(client.submit("save_weights", model, 2, path="x", user_metadata={"k": secret.decode()}))
        client.retrieve(client.step(model, 3))
        assert _wait_empty(server)
        files = b"".join(p.read_bytes() for p in tmp_path.glob("tg-tinker.db*"))
        assert secret not in files
        assert b"who" not in b"".join(
            r.sealed for r in server._foundation.db.read(lambda tx: tx.execute(t.gateway_sessions.select()).all())
        )


def test_samples_under_way_are_asked_for_again_after_a_restart(tmp_path: Path) -> None:
    with EmbeddedServer(config(tmp_path)) as first:
        client = Raw(first.tinker_url, first.mint_key()).open()
        body = {"session_id": client.session, "sampling_session_seq_id": 0, "base_model": "bigram"}
        sampler = client.ok("create_sampling_session", body)["sampling_session_id"]
        sample = {
            "sampling_session_id": sampler,
            "seq_id": 73500060000000000,
            "num_samples": 2,
            "prompt": {"chunks": [{"tokens": [1, 2], "type": "encoded_text"}]},
            "sampling_params": {"max_tokens": 3, "seed": 1, "stop": []},
        }
        answer = client.ok("asample", sample)
        assert len(answer["sample_sequence_ids"]) == 2
        before = client.retrieve(answer["request_id"], proto=True)
    with EmbeddedServer(config(tmp_path)) as second:
        client = Raw(second.tinker_url, client.key, session=client.session)
        assert client.post("retrieve_future", {"request_id": answer["request_id"]}).status_code == 410
        assert client.call("GET", f"samplers/{sampler}").json()["base_model"] == "bigram"
        assert client.retrieve(client.ok("asample", sample)["request_id"], proto=True) == before


def _wait_empty(server: EmbeddedServer) -> bool:
    for _ in range(3000):
        if not _kept(server):
            return True
        threading.Event().wait(0.02)
    return False

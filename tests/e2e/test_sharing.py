"""Clients that train at the same time get what each would get alone, over the real service."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.server_process import batch
from tests.server.rpc.raw_client import RawClient
from tests.server.rpc.raw_client import batch as raw_batch
from tg_tinker import DPConfig, FutureCancelledError, InvalidRequestError, LoRAConfig, ServiceClient, TrainingConfig
from tg_tinker.wire.call_messages import call_to_proto
from tg_tinker.wire.calls import Position
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.engine.bigram import BigramBackend, BigramSession

CLIENTS = 8


@pytest.fixture(params=["bigram", "torch"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EmbeddedServer]:
    # Micro-batches of two records, so that every pass has several slices.
    config = ServerConfig(port=0, backend=request.param, data_dir=tmp_path / "data", micro_batch_tokens=32)
    with EmbeddedServer(config) as running:
        yield running


def config_of(server: EmbeddedServer, number: int) -> TrainingConfig:
    model = "bigram" if isinstance(server._backend, BigramBackend) else "tiny-llama-2m"
    dp = DPConfig(noise_multiplier=1.0, target_epsilon=1e4) if number % 2 else None
    return TrainingConfig(model_ref=model, lora_config=LoRAConfig(rank=4), dp_config=dp, batch_size=4, seed=number)


def train(service: ServiceClient, config: TrainingConfig, number: int) -> list[float]:
    """Figures of one logical batch of two calls, before noise; sizes differ between clients."""
    client = service.create_training_client(config)
    futures = [client.forward_backward(batch(10 * number + i, records=2 + number % 3, tokens=15)) for i in (0, 1)]
    done = client.optim_step()
    losses = [f.result(60).loss for f in futures]
    norms = done.result(60).dp_metrics
    after = [] if norms else [client.forward_backward(batch(99)).result(60).loss]
    return [*losses, *after, norms.grad_norm_before_clip if norms else done.result().grad_norm]


def test_eight_clients_at_once_get_the_figures_of_each_alone(server: EmbeddedServer) -> None:
    numbers = range(CLIENTS)
    with ServiceClient(api_key=server.mint_key("a"), base_url=server.address) as service:
        alone = [train(service, config_of(server, n), n) for n in numbers]
        barrier = threading.Barrier(CLIENTS)

        def at_once(number: int) -> list[float]:
            barrier.wait(30)
            return train(service, config_of(server, number), number)

        with ThreadPoolExecutor(CLIENTS) as pool:
            together = list(pool.map(at_once, numbers))
    for one, other in zip(alone, together, strict=True):
        assert other == pytest.approx(one, rel=2e-5)


def test_a_client_whose_batches_are_malformed_hurts_nobody_beside_it(server: EmbeddedServer) -> None:
    with ServiceClient(api_key=server.mint_key("a"), base_url=server.address) as service:
        expected = train(service, config_of(server, 2), 2)
        bad = service.create_training_client(config_of(server, 0))
        with ThreadPoolExecutor(2) as pool:
            good = pool.submit(lambda: [train(service, config_of(server, 2), 2) for _ in range(3)])
            for _ in range(10):
                with pytest.raises(InvalidRequestError):
                    bad.forward_backward({"input_ids": [[10**6, 1]]}).result(60)
            for figures in good.result():
                assert figures == pytest.approx(expected, rel=2e-5)


@dataclass
class SlowPass:
    """A pass of many slices around the model's own single one."""

    work: Any
    left: int = 400
    taken: int = 0

    @property
    def finished(self) -> bool:
        return self.left == 0

    def advance(self, others: Sequence[Any] = ()) -> list[Any]:
        self.left -= 1
        self.taken += 1
        time.sleep(0.01)
        if self.finished:
            self.work.advance()
        return []

    def result(self) -> Any:
        return self.work.result()


@pytest.fixture
def slow_passes(monkeypatch: pytest.MonkeyPatch) -> list[SlowPass]:
    """Passes of many slices, in the order of their start."""
    started: list[SlowPass] = []
    start = BigramSession.start

    def slowly(self: BigramSession, request: Any) -> SlowPass:
        started.append(SlowPass(start(self, request)))
        return started[-1]

    monkeypatch.setattr(BigramSession, "start", slowly)
    return started


@pytest.mark.parametrize("server", ["bigram"], indirect=True)
def test_a_cancelled_pass_stops_at_its_next_slice(server: EmbeddedServer, slow_passes: list[SlowPass]) -> None:
    with ServiceClient(api_key=server.mint_key("a"), base_url=server.address) as service:
        client = service.create_training_client(TrainingConfig(model_ref="bigram", batch_size=4))
        future = client.forward_backward(batch(1))
        while not slow_passes:
            time.sleep(0.01)
        time.sleep(0.1)
        assert future.cancel()
        with pytest.raises(FutureCancelledError):
            future.result(10)
        assert slow_passes[0].left > 0


def test_a_server_that_stops_does_not_wait_for_passes_that_take_turns(
    tmp_path: Path, slow_passes: list[SlowPass]
) -> None:
    server = EmbeddedServer(ServerConfig(port=0, backend="bigram", data_dir=tmp_path / "data")).start()
    client = RawClient(server.address, server.mint_key("a"))
    for _ in range(3):
        run_id = client.create(TrainingConfig(model_ref="bigram", batch_size=4)).run_id
        client.send(call_to_proto(raw_batch(1), Position(run_id=run_id, seq=1)))
    while len(slow_passes) < 3:
        time.sleep(0.01)
    server.stop(grace_s=0.1)
    assert all(p.left > 0 for p in slow_passes)

"""A server that samples with vLLM, and who answered. `make test-vllm` runs these tests, and nothing else does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tg_tinker import ServiceClient
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.engine.sampling.token_sampler import BatchedSampler


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The interpreter that has vLLM. Without one these tests fail: whoever asks for them wants to know."""
    python = os.environ.get("TG_TINKER_VLLM_PYTHON", "")
    assert python, "set TG_TINKER_VLLM_PYTHON to the python of an environment that has vllm"
    return python


@pytest.fixture(scope="session")
def server(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """One server for all tests: a worker takes long to start."""
    config = ServerConfig(
        port=0,
        tinker_port=0,
        data_dir=tmp_path_factory.mktemp("server"),
        sampler="vllm",
        vllm_python=vllm_python,
        vllm_cache_gib=0.5,
    )
    with EmbeddedServer(config) as running:
        yield running


@pytest.fixture(scope="session")
def service(server: EmbeddedServer) -> Iterator[ServiceClient]:
    """The client of one tenant."""
    with ServiceClient(api_key=server.mint_key("tenant-a"), base_url=server.address) as client:
        yield client


class BuiltIn:
    """What the built-in sampler was given."""

    def __init__(self) -> None:
        self.requests = 0


@pytest.fixture
def built_in(monkeypatch: pytest.MonkeyPatch) -> BuiltIn:
    """Counts requests that vLLM did not answer."""
    counted, submit = BuiltIn(), BatchedSampler.submit

    def counting(self: BatchedSampler, *args: object, **kwargs: object) -> object:
        counted.requests += 1
        return submit(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(BatchedSampler, "submit", counting)
    return counted


def children() -> list[int]:
    """Processes that are workers of this one."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == os.getpid() and b"engine/vllm/worker.py" in command:
                found.append(int(entry.name))
    return found

"""A real server for the coordinator, on a real socket, with the NumPy model; each test has a tenant of its own."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from tg_tinker import ServiceClient
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig


@pytest.fixture(scope="module")
def coordinator_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    folder = tmp_path_factory.mktemp("coordinator-server")
    with EmbeddedServer(ServerConfig(port=0, backend="bigram", data_dir=folder)) as server:
        yield server


@pytest.fixture
def coordinator_service(coordinator_server: EmbeddedServer) -> Iterator[ServiceClient]:
    key = coordinator_server.mint_key(f"tenant-{uuid.uuid4().hex}")
    with ServiceClient(key, coordinator_server.address) as service:
        yield service

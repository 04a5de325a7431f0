"""A real server for the coordinator, on a real socket, with the NumPy model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tg_tinker import ServiceClient
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig


@pytest.fixture
def coordinator_server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(ServerConfig(port=0, backend="bigram", data_dir=tmp_path / "coordinator-server")) as server:
        yield server


@pytest.fixture
def coordinator_service(coordinator_server: EmbeddedServer) -> Iterator[ServiceClient]:
    with ServiceClient(coordinator_server.mint_key(), coordinator_server.address) as service:
        yield service

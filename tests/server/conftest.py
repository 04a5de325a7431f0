"""A real server in this process, on a real socket, with the NumPy model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig


@pytest.fixture
def bigram_server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(ServerConfig(port=0, backend="bigram", data_dir=tmp_path / "data")) as server:
        yield server

"""A server for the documents, found through the environment like anybody's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import tg_tinker_server
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig

BUNDLED = Path(tg_tinker_server.__file__).parent / "assets" / "tiny-llama-2m"


@pytest.fixture(scope="session")
def documented_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """The bundled model, also under the name that the API reference uses."""
    config = ServerConfig(
        port=0,
        data_dir=tmp_path_factory.mktemp("server"),
        models={"meta-llama/Llama-3-8B": str(BUNDLED)},
        log_level="error",
    )
    with EmbeddedServer(config) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TG_TINKER_BASE_URL", server.address)
        patch.setenv("TG_TINKER_API_KEY", server.mint_key("documents"))
        yield server

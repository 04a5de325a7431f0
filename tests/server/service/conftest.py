"""A client of a server with the NumPy model, for tests of the services behind it."""

from __future__ import annotations

import pytest

from tests.server.rpc.raw_client import RawClient
from tg_tinker_server.app import EmbeddedServer


@pytest.fixture
def client(bigram_server: EmbeddedServer) -> RawClient:
    return RawClient(bigram_server.address, bigram_server.mint_key())

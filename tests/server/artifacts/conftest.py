"""A vault in memory and its parts."""

from __future__ import annotations

import pytest

from tg_tinker_server.artifacts.blobs import MemoryBlobs
from tg_tinker_server.artifacts.vault import Vault
from tg_tinker_server.crypto.envelope import TenantKeyring
from tg_tinker_server.crypto.key_rows import MemoryKeyRows
from tg_tinker_server.crypto.keys import LocalKeyProvider


@pytest.fixture
def blobs() -> MemoryBlobs:
    return MemoryBlobs()


@pytest.fixture
def keys() -> TenantKeyring:
    return TenantKeyring(LocalKeyProvider(bytes(range(32))), MemoryKeyRows())


@pytest.fixture
def vault(blobs: MemoryBlobs, keys: TenantKeyring) -> Vault:
    return Vault(blobs, keys)

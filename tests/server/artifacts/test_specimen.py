"""Artifacts of every released format stay readable, here and with the reader printed in the documentation."""

from __future__ import annotations

import base64
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from tg_tinker_server.artifacts.blobs import MemoryBlobs
from tg_tinker_server.artifacts.vault import Vault
from tg_tinker_server.crypto.envelope import TenantKeyring
from tg_tinker_server.crypto.key_rows import KeyRow, MemoryKeyRows
from tg_tinker_server.crypto.keys import LocalKeyProvider

ROOT = Path(__file__).parents[3]
SPECIMENS = sorted((ROOT / "tests" / "compat").glob("artifact-v*.json"))
PAGE = ROOT / "docs" / "formats" / "artifact.md"


def load(path: Path) -> dict[str, Any]:
    specimen: dict[str, Any] = json.loads(path.read_text())
    for name in ("root_key", "row", "artifact"):
        specimen[name] = base64.b64decode(specimen[name])
    return specimen


def test_there_is_a_specimen_of_version_1() -> None:
    assert [p.name for p in SPECIMENS] == ["artifact-v1.json"]


@pytest.mark.parametrize("path", SPECIMENS, ids=lambda p: p.stem)
def test_the_vault_opens_it(path: Path) -> None:
    s, rows, blobs = load(path), MemoryKeyRows(), MemoryBlobs()
    rows.put_version(KeyRow(tenant=s["tenant"], version=s["version"], wrapped=s["row"], created=datetime.now(UTC)))
    blobs.put(s["artifact_id"], [s["artifact"]])
    vault = Vault(blobs, TenantKeyring(LocalKeyProvider(s["root_key"]), rows))
    opened = vault.open(tenant=s["tenant"], artifact_id=s["artifact_id"], kind=s["kind"])
    assert opened.state == s["state"]
    assert {n: a.tolist() for n, a in opened.tensors.items()} == s["tensors"]


def test_the_reader_printed_in_the_documentation_opens_it() -> None:
    s = load(SPECIMENS[0])
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    plain = names["read_artifact"](s["root_key"], s["row"], s["tenant"], s["version"], s["artifact"])
    assert {n: a.tolist() for n, a in safetensors.numpy.load(plain).items()} == s["tensors"]


def test_the_reader_printed_in_the_documentation_opens_many_segments() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    rows, root = MemoryKeyRows(), bytes(range(32))
    vault = Vault(MemoryBlobs(), TenantKeyring(LocalKeyProvider(root), rows))
    array = np.random.default_rng(3).integers(0, 255, 2_500_000, np.uint8)
    vault.seal(tenant="t", artifact_id="ck_00000000", kind="state", tensors={"x": array}, state={})
    pulled = b"".join(vault.stream(tenant="t", artifact_id="ck_00000000"))
    plain = names["read_artifact"](root, rows.get_versions("t")[0].wrapped, "t", 1, pulled)
    np.testing.assert_array_equal(safetensors.numpy.load(plain)["x"], array)

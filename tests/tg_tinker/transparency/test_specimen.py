"""What version 1 wrote stays readable, here and with the reader printed in the documentation."""

from __future__ import annotations

import base64
import json
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature

from tg_tinker.transparency.folder import Folder
from tg_tinker.transparency.merkle import leaf_hash, root_of, verify_consistency, verify_inclusion, verify_subset
from tg_tinker.transparency.note import Checkpoint, VerifierKey
from tg_tinker.transparency.pins import KnownServer, Pins
from tg_tinker.transparency.receipts import Receipts

ROOT = Path(__file__).parents[3]
SPECIMEN = ROOT / "tests" / "compat" / "log-v1"
PAGE = (ROOT / "docs" / "formats" / "log.md").read_text()
ORIGIN = "tg-tinker/12fad6ee5e6387d6a41f88f5194b2d55"
LEAVES = [leaf_hash(line.encode()) for line in (SPECIMEN / "leaves.jsonl").read_text().splitlines()]
PROOFS: dict[str, Any] = json.loads((SPECIMEN / "proofs.json").read_text())
KEY = VerifierKey.parse(PROOFS["verifier_key"])


def proof(name: str) -> list[bytes]:
    return [base64.b64decode(h) for h in PROOFS[name]["proof"]]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A copy: reading makes no files, but a client would."""
    return Folder(Path(shutil.copytree(SPECIMEN, tmp_path / "data")))


@pytest.fixture
def reader() -> dict[str, Any]:
    """The functions printed on the page."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def test_the_pin_and_the_known_server(folder: Folder) -> None:
    pins = Pins(folder)
    assert pins.servers() == [KnownServer("tinker.example:50051", "acme", ORIGIN)]
    pin = pins.get(ORIGIN)
    assert pin is not None
    assert pin.seen == datetime(2026, 3, 1, 12, 30, 5, tzinfo=UTC)
    assert pin.checkpoint == Checkpoint(ORIGIN, 5, root_of(LEAVES))
    assert pin.to_json() == (SPECIMEN / "pins" / "12fad6ee5e6387d6a41f88f5194b2d55.json").read_text()


def test_the_receipts(folder: Folder) -> None:
    found = Receipts(folder).read_all(ORIGIN, "data-1")
    assert [r.leaf_index for r in found] == [1, 3]
    assert {r.verify(KEY) for r in found} == {Checkpoint(ORIGIN, 5, root_of(LEAVES))}
    (file,) = (SPECIMEN / "receipts").rglob("*.jsonl")
    assert [r.to_json() for r in found] == file.read_text().splitlines()


def test_the_checkpoints_and_proofs() -> None:
    roots = {int(n): Checkpoint.open(note, KEY).root for n, note in PROOFS["checkpoints"].items()}
    assert roots == {3: root_of(LEAVES[:3]), 5: root_of(LEAVES)}
    verify_inclusion(LEAVES[1], 1, 5, proof("inclusion"), roots[5])
    verify_consistency(3, 5, roots[3], roots[5], proof("consistency"))
    verify_subset({i: LEAVES[i] for i in PROOFS["subset"]["leaf_indexes"]}, 5, proof("subset"), roots[5])


def test_the_reader_printed_in_the_documentation(reader: dict[str, Any]) -> None:
    for size in ("3", "5"):
        note = PROOFS["checkpoints"][size]
        read = reader["read_checkpoint"](note, KEY.text)
        assert read == (int(size), reader["root"](LEAVES[: int(size)]))
        with pytest.raises((AssertionError, InvalidSignature)):
            reader["read_checkpoint"](note.replace(f"\n{size}\n", "\n4\n"), KEY.text)
    rest = proof("subset")
    assert reader["root_from_subset"]({1: LEAVES[1], 3: LEAVES[3]}, 0, 5, rest) == root_of(LEAVES)
    assert rest == []
    (file,) = (SPECIMEN / "receipts").rglob("*.jsonl")
    lines = file.read_text().splitlines()
    assert [reader["read_receipt"](line)["position"] for line in lines] == [1, 3]
    with pytest.raises(AssertionError):
        reader["read_receipt"](lines[0].replace("1.25", "0.25"))


def test_the_numbers_of_the_worked_example() -> None:
    example = PAGE.partition("## A worked example")[2].partition("### A reader")[0]
    assert f"`{LEAVES[0].hex()[:6]}…`" in example
    assert f"`{root_of(LEAVES[:3]).hex()[:6]}…`" in example
    assert f"`{root_of(LEAVES).hex()[:6]}…`" in example
    assert f"```\n{PROOFS['checkpoints']['5']}```" in example
    assert proof("subset") == [LEAVES[0], LEAVES[2], LEAVES[4]]
    assert proof("inclusion")[0] == LEAVES[0]
    assert proof("inclusion")[2] == LEAVES[4]

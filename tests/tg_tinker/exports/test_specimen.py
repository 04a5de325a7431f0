"""Exports of every released format stay readable."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.exports import ARTIFACT, CLAIM, LORA, WEIGHTS
from tg_tinker.exports import files
from tg_tinker.reports.exported import check_words
from tg_tinker.transparency.note import VerifierKey

FOLDER = Path(__file__).parents[2] / "compat" / "export-v1"
KEYS = files.read_identities(FOLDER / "keys.txt")
SIGNER = VerifierKey.parse((FOLDER / "signer.txt").read_text().strip())


@pytest.mark.parametrize("name", ["export.age", "export.hpke"])
def test_a_specimen_of_version_1_opens_and_says_what_it_said(name: str, tmp_path: Path) -> None:
    claims = files.unpack(FOLDER / name, SIGNER, tmp_path / "out", KEYS).predicate
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == WEIGHTS
    assert claims["artifact"]["id"] == ARTIFACT
    assert claims["artifact"]["step"] == 7
    assert claims["privacy"] is None
    assert claims["lora_config"] == {**LORA, "alpha": "4.0", "dropout": "0.0"}
    assert [e["privacy"] for e in claims["provenance"]] == [CLAIM]
    reader = files.check(tmp_path / "out", SIGNER)
    assert reader.manifest.predicate == claims
    assert [v.check for v in check_words(reader)] == ["words"]  # the card's words are part of the format

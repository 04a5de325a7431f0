"""The report that version 2 began with verifies for ever, here and with the reader printed in the documentation."""

from __future__ import annotations

import json
import re
from base64 import b64decode, b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.tg_tinker.reports.conftest import Forge, settled_forge
from tg_tinker.ledger import history
from tg_tinker.reports import statement
from tg_tinker.reports.documents import verify_document
from tg_tinker.reports.page import render
from tg_tinker.reports.verdicts import Trust
from tg_tinker.transparency.note import VerifierKey

ROOT = Path(__file__).parents[3]
SPECIMEN = ROOT / "tests" / "compat" / "report-v2"
PAGE = (ROOT / "docs" / "formats" / "report.md").read_text()
FILE = (SPECIMEN / "report.json").read_bytes()
KEY = (SPECIMEN / "verifier-key.txt").read_text().strip()
Reader = Callable[[bytes, str], dict[str, Any]]


@pytest.fixture
def reader() -> Reader:
    """The function printed on the page."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    read: Reader = names["read_report"]
    return read


def test_the_specimen_passes_every_check() -> None:
    verdicts = list(verify_document(FILE, Trust(keys=[VerifierKey.parse(KEY)])))
    assert [v.check for v in verdicts] == [
        "signature", "format", "checkpoint", "chain", "leaves", "last entry", "guarantee", "coverage", "curve",
        "epsilon", "second accountant", "receipts",
    ]  # fmt: skip


def test_the_specimen_says_what_was_done(reader: Reader) -> None:
    """Three steps drawn by the server from a registered dataset; audit, erasure, raise; a step of another run."""
    report = reader(FILE, KEY)
    kinds = [e["body"]["kind"] for e in report["integrity"]["entries"]]
    step = ["charge", "settle"]
    assert kinds == ["register", "open", *step, *step, *step, "audit", "erase", "raise", "open", *step, "report"]
    assert report["sampling"]["by_server"] == 3
    assert [c["kind"] for c in report["coverage"]["changes"]] == ["register", "erase", "raise"]
    assert report["guarantee"]["target_epsilon"] == "7.0"
    assert report["guarantee"]["epsilon"] == "1.2463100998383285"
    assert "factor of e<sup>1.247</sup>" in render(report)


def test_the_printed_reader_reads_what_is_written_today(reader: Reader) -> None:
    forge = settled_forge().close()
    assert reader(forge.sign(), forge.key.text) == forge.document()


def test_the_printed_reader_refuses_what_was_changed(reader: Reader) -> None:
    envelope = json.loads(FILE)
    report = json.loads(b64decode(envelope["payload"]))
    with pytest.raises(InvalidSignature):
        reader(FILE, Forge(secret=Ed25519PrivateKey.generate()).key.text)
    report["guarantee"]["epsilon"] = "0.1"
    envelope["payload"] = b64encode(json.dumps(report).encode()).decode()
    with pytest.raises(InvalidSignature):
        reader(json.dumps(envelope).encode(), KEY)
    for damage in (lambda c: c.pop(3), lambda c: c.pop(), lambda c: c[2][0].update(epsilon_after="0.1")):
        forge = settled_forge()
        damage(forge.close().chain)  # re-signed with the real key
        payload = {"integrity": forge.integrity()}
        with pytest.raises((AssertionError, StopIteration)):
            reader(forge.sign(payload), forge.key.text)


def test_every_field_of_a_report_and_of_an_entry_is_on_the_page() -> None:
    named = set(re.findall(r"`([a-z_]+)`", PAGE))
    report = json.loads(b64decode(json.loads(FILE)["payload"]))
    sections = [report, *(v for v in report.values() if isinstance(v, dict))]
    fields = {field for section in sections for field in section}
    fields |= {f for needed, allowed in history.FIELDS.values() for f in needed | allowed} | set(history.FIELDS)
    assert fields - named == set()
    assert statement.FORMAT in PAGE
    assert statement.PAYLOAD_TYPE in PAGE

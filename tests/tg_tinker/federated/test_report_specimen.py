"""The reports that version 1 began with verify for ever, here and with the reader printed in the documentation."""

from __future__ import annotations

import json
import re
from base64 import b64decode, b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cryptography.exceptions import InvalidSignature

from tests.tg_tinker.federated.reported import COORDINATOR, honest, lied, population, resigned, uneven
from tg_tinker.cli import main
from tg_tinker.federated import report, statement
from tg_tinker.federated.keys import public_text
from tg_tinker.federated.report_page import render
from tg_tinker.federated.report_verify import FOLLOWS

ROOT = Path(__file__).parents[3]
SPECIMEN = ROOT / "tests" / "compat" / "federation-report-v1"
PAGE = (ROOT / "docs" / "formats" / "federation.md").read_text()
PUBLIC = (SPECIMEN / "coordinator.pub").read_text().strip()
Reader = Callable[[bytes, str], dict[str, Any]]
EPSILON = {
    "records": {"records": "17.8"},
    "masked": {"records": "9.09"},
    "sites": {"records": "18", "sites": "2.607"},
}


@pytest.fixture
def reader() -> Reader:
    """The function printed on the page."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    read: Reader = names["read_federation_report"]
    return read


@pytest.mark.parametrize("name", EPSILON)
def test_a_specimen_passes_every_check_and_says_what_it_said(name: str, reader: Reader) -> None:
    file = SPECIMEN / f"{name}.json"
    given = ["audit", "verify", str(file), "--key", PUBLIC]
    if name == "records":
        given += ["--site-report", str(SPECIMEN / "records-site-0.json")]
    done = CliRunner().invoke(main, given)
    assert done.exit_code == 0, done.output
    assert ("ok       site report" in done.output) == (name == "records")
    said = reader(file.read_bytes(), PUBLIC)
    for part, epsilon in EPSILON[name].items():
        assert said["guarantee"][part]["epsilon"] == epsilon
        assert f"e<sup>{epsilon}</sup>" in render(said)
    assert (said["masking"] is not None) == (name == "masked")


@pytest.mark.parametrize("made", [honest, uneven, population])
def test_the_printed_reader_reads_what_is_written_today(made: Callable[[], Any], reader: Reader) -> None:
    assert reader(made().sign(), public_text(COORDINATOR)) == made().document()


def test_the_printed_reader_refuses_what_was_changed(reader: Reader) -> None:
    file = (SPECIMEN / "records.json").read_bytes()
    envelope = json.loads(file)
    envelope["payload"] = b64encode(b64decode(envelope["payload"]).replace(b"17.8", b"10.8")).decode()
    with pytest.raises(InvalidSignature):
        reader(json.dumps(envelope).encode(), PUBLIC)
    for lie in (
        lambda d: d["guarantee"]["records"].update(epsilon="9.08"),
        lambda d: d["job"].update(rounds=4),
        resigned("site-1", (1, 2)),
        resigned("site-1", job="0" * 64),
    ):
        with pytest.raises(AssertionError):
            reader(lied(honest, lie), PUBLIC)
    with pytest.raises(InvalidSignature):
        reader(lied(honest, resigned("site-1", by="coordinator")), PUBLIC)


def test_every_field_of_a_report_and_of_a_statement_is_on_the_page() -> None:
    named = set(re.findall(r"`([a-z_0-9]+)`", PAGE))
    fields = set(statement.SiteStatement.model_fields) | set(statement.Accounting.model_fields)
    for made in (honest(), uneven(), population()):
        document = made.document()
        fields |= set(document)
        rows = [*document["sites"], *document["trust_model"], *document["course"]["rounds"], document["course"]]
        rows += [
            document[name] or {} for name in ("guarantee", "method", "masking", "model", "coverage", "integrity")
        ]
        rows += [part or {} for part in document["guarantee"].values() if not isinstance(part, str)]
        rows += [row["all_of_its_data"] or {} for row in document["sites"]]
        rows += list((document["course"]["left"] or {}).values())
        fields |= {field for row in rows for field in row}
    assert fields - named == set()
    for name in (report.FORMAT, report.PAYLOAD_TYPE, report.KEY_NAME, statement.PAYLOAD_TYPE, statement.KEY_PREFIX):
        assert name in PAGE


def test_every_check_that_can_refuse_is_on_the_page() -> None:
    code = "".join(
        (ROOT / "tg_tinker" / "federated" / f"{name}.py").read_text()
        for name in ("report", "report_verify", "report_sites")
    )
    checks = set(re.findall(r'refused\(\s*"([a-z ]+)"', code)) | {check for _, check in FOLLOWS}
    assert {check for check in checks if f"`{check}`" not in PAGE} <= {"site report"}  # which has a paragraph

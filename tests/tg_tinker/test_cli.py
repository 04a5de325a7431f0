"""The command line without a server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.tg_tinker.ledger.test_chain import charge, opening, settle
from tg_tinker import cli
from tg_tinker.ledger import LEDGER_DOMAIN, START, ChainEntry


@pytest.fixture
def lines() -> list[str]:
    bodies: list[dict[str, Any]] = [
        opening(),
        charge(1, "1.25"),
        settle(1, 1),
    ]
    entries: list[ChainEntry] = []
    for position, body in enumerate(bodies):
        before = entries[-1].entry_hash if entries else START
        whole = {**body, "dataset_id": "data-1"}
        entries.append(ChainEntry.make(LEDGER_DOMAIN, whole, position=position, prev_hash=before))
    return [e.to_json() for e in entries]


def verify(tmp_path: Path, text: str, *options: str) -> tuple[int, str]:
    file = tmp_path / "ledger.jsonl"
    file.write_text(text, encoding="utf-8")
    done = CliRunner().invoke(cli.main, ["ledger", "verify", str(file), *options])
    return done.exit_code, done.output


def test_a_whole_ledger_is_intact_and_its_head_is_printed(tmp_path: Path, lines: list[str]) -> None:
    head = ChainEntry.from_json(lines[-1]).entry_hash.hex()
    code, said = verify(tmp_path, "\n".join(lines) + "\n\n", "--head", head)
    assert code == 0
    assert f"intact: 3 entries, 1 charges, head {head}" in said
    assert "data-1: 1.2500 of 4 epsilon" in said


def test_a_changed_ledger_is_refused_at_its_position(tmp_path: Path, lines: list[str]) -> None:
    for changed, position in (
        ([lines[0], lines[1].replace("1.25", "0.25"), lines[2]], 1),
        ([lines[0], lines[2]], 1),
        ([lines[0], lines[2], lines[1]], 1),
        (lines[1:], 0),
    ):
        code, said = verify(tmp_path, "\n".join(changed))
        assert code == 1
        assert f"position {position}" in said or "first entry does not open" in said


def test_a_ledger_cut_short_is_found_by_the_head(tmp_path: Path, lines: list[str]) -> None:
    head = ChainEntry.from_json(lines[-1]).entry_hash.hex()
    assert verify(tmp_path, "\n".join(lines[:2]))[0] == 0
    code, said = verify(tmp_path, "\n".join(lines[:2]), "--head", head)
    assert code == 1
    assert "cut off or rewritten" in said


@pytest.mark.parametrize(
    "text", ["", "{}", "not json", '{"body": {"kind": "open"}, "entry_hash": "00"}', "[1]", "\x00"]
)
def test_a_file_that_is_no_ledger_is_refused_without_a_trace(tmp_path: Path, text: str) -> None:
    code, said = verify(tmp_path, text)
    assert code == 1
    assert "Traceback" not in said
    assert "not a ledger" in said


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"\xff\xfe\x00")
    done = CliRunner().invoke(cli.main, ["ledger", "verify", str(file)])
    assert done.exit_code == 1
    assert "not a text file" in done.output


def test_a_head_that_is_no_hash_is_a_usage_error(tmp_path: Path, lines: list[str]) -> None:
    assert verify(tmp_path, "\n".join(lines), "--head", "xyz")[0] == 2


def test_verifying_needs_none_of_the_servers_packages(tmp_path: Path, lines: list[str]) -> None:
    import subprocess

    file = tmp_path / "ledger.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    program = (
        "import sys\n"
        "for name in ('torch', 'sqlalchemy', 'opacus', 'tg_tinker_server'): sys.modules[name] = None\n"
        "from tg_tinker.cli import main\n"
        f"main(['ledger', 'verify', {str(file)!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "intact" in done.stdout

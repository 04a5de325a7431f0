"""Commands that pages show are commands that exist, and print what the page prints."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.docs.test_pages import PAGES, ROOT
from tg_tinker.cli import main

COMMAND = re.compile(r"^\$ (?:\.venv/bin/)?tg-tinker ([^#\n]*)", re.MULTILINE)
COMMANDS = sorted({(page, line.strip()) for page in PAGES for line in COMMAND.findall(page.read_text())})
TARGET = re.compile(r"\bmake ([a-z-]+)\b")


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=lambda v: v if isinstance(v, str) else v.stem)
def test_every_shown_command_and_option_exists(page: Path, line: str) -> None:
    words = shlex.split(line)
    names = []
    for word in words:
        if word.startswith("-") or "." in word or "/" in word:
            break
        names.append(word)
    shown = CliRunner().invoke(main, [*names, "--help"])
    assert shown.exit_code == 0, shown.output
    for option in (word for word in words if word.startswith("--")):
        assert option in shown.output


def test_pages_show_enough_commands_to_be_worth_checking() -> None:
    assert len(COMMANDS) >= 6


def test_the_plan_on_the_page_is_what_the_command_prints() -> None:
    page = (ROOT / "docs" / "how-to" / "choose-a-budget.md").read_text()
    block = re.search(r"^\$ tg-tinker (privacy plan .*)\n((?:.*\n)+?)```", page, re.MULTILINE)
    assert block is not None
    printed = CliRunner().invoke(main, shlex.split(block[1]))
    assert printed.exit_code == 0, printed.output
    assert printed.output.split() == block[2].split()


@pytest.mark.parametrize("page", [p for p in PAGES if TARGET.search(p.read_text())], ids=lambda p: p.stem)
def test_every_shown_make_target_exists(page: Path) -> None:
    code = " ".join(re.findall(r"`[^`]*`|^\$ .*$", page.read_text(), re.MULTILINE))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(TARGET.findall(code)) <= targets

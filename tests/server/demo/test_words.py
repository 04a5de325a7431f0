import sys
from pathlib import Path

import pytest

from tg_tinker_server.demo.words import program


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A virtual environment in the folder that commands are typed in."""
    own = tmp_path / ".venv" / "bin" / "tg-tinker"
    own.parent.mkdir(parents=True)
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(own.parent / "python"))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)
    return own


def test_an_environment_that_is_not_active_is_named_by_its_path(environment: Path):
    assert program() == ".venv/bin/tg-tinker"


def test_an_active_environment_is_called_by_name(environment: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(environment.parent))
    assert program() == "tg-tinker"


def test_an_environment_elsewhere_is_named_in_full(
    environment: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert program() == str(environment)

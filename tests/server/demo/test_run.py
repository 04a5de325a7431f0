"""The demo itself, small: a real server on a real socket, the bundled model, a few steps."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from tg_tinker.cli import main
from tg_tinker.errors import DPBudgetExceededError
from tg_tinker.ledger import ChainEntry, verify_chain
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.demo.command import ROLES, TENANT, OwnServer
from tg_tinker_server.demo.progress import TrainingProgress
from tg_tinker_server.demo.report import Findings
from tg_tinker_server.demo.run import run
from tg_tinker_server.demo.settings import DemoSettings
from tg_tinker_server.demo.state import StepPoint

SMALL = DemoSettings(
    steps=4, expected_batch_size=16, micro_batch_size=8, held_out=6, train_limit=120, target_delta=1e-3, rank=2
)


class Terminal:
    """Runs the demo and keeps what it printed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder.parent / "demo-report.html"
        self.printed = ""

    @contextmanager
    def server(self) -> Iterator[OwnServer]:
        with EmbeddedServer(ServerConfig(port=0, data_dir=self.folder, log_level="error")) as server:
            yield OwnServer(server.address, server.mint_key(TENANT, ROLES))

    def demo(self) -> Findings:
        text = io.StringIO()
        try:
            with self.server() as server:
                console = Console(file=text, width=110)
                return run(console, server, self.out, folder=self.folder, settings=SMALL)
        finally:
            self.printed = text.getvalue()


@pytest.fixture
def terminal(tmp_path: Path) -> Terminal:
    return Terminal(tmp_path / "demo")


def test_the_demo_trains_saves_opens_and_reports_and_then_shows_it_again(terminal: Terminal) -> None:
    first = terminal.demo()
    assert [point.step for point in first.history] == [1, 2, 3, 4]
    assert [point.epsilon for point in first.history] == sorted(point.epsilon for point in first.history)
    assert 7.9 < first.ledger.epsilon <= 8.0
    assert first.ledger.pld_epsilon <= first.ledger.epsilon
    assert first.ledger.charges == 4
    assert first.reopened_equal
    assert first.ciphertext_matches
    assert first.checkpoint.artifact_id in terminal.printed
    assert "\x1b" not in terminal.printed
    assert "step   4 of 4" in terminal.printed
    assert first.checkpoint.artifact_id in terminal.out.read_text()
    lines = (terminal.folder / "ledger.jsonl").read_text().splitlines()
    assert verify_chain([ChainEntry.from_json(line) for line in lines]).hex() == first.ledger.head

    report = terminal.out.parent / "privacy-report.json"
    verified = CliRunner().invoke(main, ["audit", "verify", str(report)])
    assert verified.exit_code == 0, verified.output
    assert f"tg-tinker audit verify {report}" in terminal.printed
    assert "Adding or removing one record" in report.with_suffix(".html").read_text()

    second = terminal.demo()
    assert "nothing is trained again" in " ".join(terminal.printed.split())
    assert second.history == first.history
    assert second.ledger.charges == first.ledger.charges
    assert second.ledger.entries == first.ledger.entries + 1  # the first call's report noted itself
    lines = (terminal.folder / "ledger.jsonl").read_text().splitlines()
    verify_chain([ChainEntry.from_json(line) for line in lines], head=bytes.fromhex(first.ledger.head))
    assert second.checkpoint == first.checkpoint
    assert second.reopened_equal


def test_an_interrupted_demo_goes_on_and_never_spends_more_than_its_target(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    show = TrainingProgress.show

    def interrupt(self: TrainingProgress, point: StepPoint) -> None:
        show(self, point)
        if point.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingProgress, "show", interrupt)
    with pytest.raises(KeyboardInterrupt):
        terminal.demo()
    monkeypatch.setattr(TrainingProgress, "show", show)
    found = terminal.demo()
    assert "after step 2" in terminal.printed
    assert [point.step for point in found.history][-1] in (3, 4)
    assert found.ledger.epsilon <= 8.0
    assert found.reopened_equal


def test_a_budget_that_others_spent_stops_the_demo_before_a_release(terminal: Terminal) -> None:
    from tg_tinker import ServiceClient

    terminal.demo()
    (terminal.folder / "demo.json").unlink()
    with terminal.server() as server, pytest.raises(DPBudgetExceededError):
        ServiceClient(api_key=server.api_key, base_url=server.address).create_training_client(
            SMALL.training_config(dataset_size=120)
        )

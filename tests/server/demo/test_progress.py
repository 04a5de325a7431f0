"""Progress: readable in a log, one line on a terminal."""

from __future__ import annotations

import io

from rich.console import Console

from tests.server.demo.values import step_point
from tg_tinker_server.demo.progress import TrainingProgress
from tg_tinker_server.demo.settings import DemoSettings

SETTINGS = DemoSettings(steps=30)


def shown(*, terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, color_system=None)
    with TrainingProgress(console, SETTINGS) as progress:
        for step in range(1, 31):
            progress.show(step_point(step))
    return out.getvalue()


def test_a_log_gets_a_plain_line_every_ten_steps() -> None:
    lines = shown(terminal=False).splitlines()
    assert [line.split("of")[0].split()[-1] for line in lines] == ["1", "10", "20", "30"]
    assert "\x1b" not in "".join(lines)
    assert "loss 4.067" in lines[-1]
    assert "epsilon 6.000 of 8" in lines[-1]
    assert "5,600 tokens/s" in lines[-1]


def test_a_terminal_shows_step_loss_epsilon_and_speed() -> None:
    last = shown(terminal=True)
    for text in ("30/30", "loss 4.067", "ε 6.000 of 8", "tokens/s"):
        assert text in last

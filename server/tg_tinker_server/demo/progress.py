"""What the person at the terminal sees while the model learns: one live line, or plain lines in a pipe."""

from __future__ import annotations

from collections import deque
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tg_tinker_server.demo.report import up
from tg_tinker_server.demo.settings import DemoSettings
from tg_tinker_server.demo.state import StepPoint

PLAIN_EVERY = 10  # steps between two lines when the output is not a terminal
RATE_WINDOW = 8  # steps the shown tokens per second are averaged over


class TrainingProgress:
    """A context manager whose ``show`` takes each finished step.

    On a terminal it is one animated line; elsewhere a line every ten steps, so that a log stays readable.
    """

    def __init__(self, console: Console, settings: DemoSettings, *, start: int = 0) -> None:
        self._console = console
        self._settings = settings
        self._recent: deque[StepPoint] = deque(maxlen=RATE_WINDOW)
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("  step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TextColumn("loss [bold]{task.fields[loss]}[/]"),
                TextColumn("ε [bold]{task.fields[epsilon]}[/] of {task.fields[target]}"),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(compact=True),
                console=console,
            )
            self._task = self._bar.add_task(
                "train",
                total=settings.steps,
                completed=start,
                loss="–",
                epsilon="–",
                target=f"{settings.target_epsilon:g}",
                rate="",
            )

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, point: StepPoint) -> None:
        """Display one step."""
        self._recent.append(point)
        rate = f"{self._tokens_per_second():,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=point.step,
                loss=f"{point.loss:.3f}",
                epsilon=up(point.epsilon),
                rate=rate,
            )
        elif point.step % PLAIN_EVERY == 0 or point.step in (1, self._settings.steps):
            self._console.print(
                f"  step {point.step:3d} of {self._settings.steps}  loss {point.loss:.3f}  "
                f"epsilon {up(point.epsilon)} of {self._settings.target_epsilon:g}  {rate}",
                highlight=False,
            )

    def _tokens_per_second(self) -> float:
        seconds = sum(point.seconds for point in self._recent)
        return sum(point.tokens for point in self._recent) / max(seconds, 1e-9)

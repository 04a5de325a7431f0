"""How a demo speaks: headings, paragraphs and facts in two columns, plain text where no terminal listens."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text


class Words:
    """Prints; plain text when the output is not a terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, text: str) -> None:
        """One paragraph."""
        self.console.print()
        self.console.print(Text(text), soft_wrap=not self.console.is_terminal)

    def line(self, text: str) -> None:
        """One line; unwrapped where a log or a pipe reads it."""
        self.console.print(Text(text), soft_wrap=not self.console.is_terminal)

    def heading(self, text: str) -> None:
        """A line in bold after an empty one."""
        self.console.print()
        self.console.print(Text(text, style="bold"), soft_wrap=not self.console.is_terminal)

    def facts(self, *rows: tuple[str, str]) -> None:
        """Names and values in two columns; unwrapped where a log or a pipe reads them."""
        width = max(len(name) for name, _ in rows)
        if not self.console.is_terminal:
            for name, value in rows:
                self.console.print(Text(f"  {name:<{width}}  {value}"), soft_wrap=True)
            return
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(Text(f"  {name:<{width}}"), Text(value))
        self.console.print(table)


def mark(good: bool, text: str) -> str:
    """A checked statement, or loudly that it does not hold."""
    return f"✓ {text}" if good else f"✗ NOT SO: {text}"


def program() -> str:
    """What to type for this environment's command line: its name where the PATH leads to it, else where it lies."""
    own = Path(sys.executable).parent / "tg-tinker"
    found = shutil.which("tg-tinker")
    if (found is not None and Path(found).absolute() == own) or not own.exists():
        return "tg-tinker"
    near = os.path.relpath(own)
    return str(own) if near.startswith("..") else near

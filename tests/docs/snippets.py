"""Finds the Python blocks of a Markdown page."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"(?P<marker><!-- run -->\n)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Snippet:
    """A block: its text, where it starts, and whether a marker says that it is to be run."""

    page: Path
    line: int
    code: str
    marked: bool

    def execute(self, namespace: dict[str, object]) -> None:
        """Run the block as it stands; a traceback shows the page and the line."""
        padded = "\n" * (self.line - 1) + self.code
        exec(compile(padded, str(self.page), "exec"), namespace)


def snippets(page: Path) -> list[Snippet]:
    """Every Python block of the page, in order."""
    text = page.read_text()
    return [
        Snippet(page, text.count("\n", 0, m.start("code")) + 1, m["code"], bool(m["marker"]))
        for m in _BLOCK.finditer(text)
    ]

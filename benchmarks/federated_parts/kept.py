"""Finished cells of a measurement: one JSON file, written after each, so that an interrupted one goes on."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


class Kept:
    """Cells by a path of names."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.cells: dict[str, Any] = from_json(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}

    def get(self, *names: str) -> Any:
        """A cell; ``None`` if it was not measured."""
        found: Any = self.cells
        for name in names:
            found = found.get(name) if isinstance(found, dict) else None
        return found

    def put(self, value: Any, *names: str) -> None:
        """Keep a cell: the whole file is replaced in one move."""
        place = self.cells
        for name in names[:-1]:
            place = place.setdefault(name, {})
        place[names[-1]] = value
        draft = self._path.with_suffix(".draft")
        draft.write_text(json.dumps(to_json(self.cells)), encoding="utf-8")
        os.replace(draft, self._path)


def to_json(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return "inf"
    if isinstance(value, dict):
        return {name: to_json(part) for name, part in value.items()}
    return [to_json(part) for part in value] if isinstance(value, list | tuple) else value


def from_json(value: Any) -> Any:
    """What `to_json` was given."""
    if value == "inf":
        return math.inf
    if isinstance(value, dict):
        return {name: from_json(part) for name, part in value.items()}
    return [from_json(part) for part in value] if isinstance(value, list) else value

"""What the demo remembers in its folder between two calls: where it was, and what it measured.

The budget belongs to the dataset and is spent by the first call, so a second one has to show what the first
found, or go on where it stopped.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tg_tinker.errors import InvalidRequestError
from tg_tinker_server.demo.settings import DemoSettings

FILE_NAME = "demo.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPoint:
    """One step as it was shown: ``loss`` is the owner's exact diagnostic, in nats per token."""

    step: int
    loss: float
    epsilon: float
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Perplexity on the public held-out texts, and one completion for each prompt."""

    perplexity: float
    samples: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The encrypted checkpoint the demo saved."""

    artifact_id: str
    size_bytes: int
    algorithm: str
    key_id: str
    content_hash: str
    saved: str


@dataclass(slots=True, kw_only=True)
class DemoRecord:
    """The demo's memory. ``run_id`` without ``checkpoint``: it was interrupted and can go on."""

    settings: dict[str, Any]
    run_id: str
    dataset_size: int
    before: Measured | None = None
    after: Measured | None = None
    history: list[StepPoint] = field(default_factory=list)
    checkpoint: Checkpoint | None = None

    @property
    def finished(self) -> bool:
        """Whether there is a checkpoint to open."""
        return self.checkpoint is not None


def save_record(folder: Path, record: DemoRecord) -> None:
    """Replace the file in one move: a reader sees the old record or the new one, never half of one."""
    path = folder / FILE_NAME
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(record)), encoding="utf-8")
    os.replace(partial, path)


def load_record(folder: Path, settings: DemoSettings) -> DemoRecord | None:
    """What an earlier call left here; ``None`` if nothing.

    Raises:
        InvalidRequestError: the folder is of other settings, or its record cannot be read.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        record = DemoRecord(
            **{
                **raw,
                "before": _measured(raw["before"]),
                "after": _measured(raw["after"]),
                "history": [StepPoint(**point) for point in raw["history"]],
                "checkpoint": Checkpoint(**raw["checkpoint"]) if raw["checkpoint"] else None,
            }
        )
    except (ValueError, KeyError, TypeError) as e:
        raise InvalidRequestError(
            f"{path} cannot be read ({type(e).__name__}); start over beside it with --fresh",
            field="state",
            constraint="a record this version wrote",
        ) from e
    if record.settings != settings.to_json():
        raise InvalidRequestError(
            f"{folder} was made with other settings, and its budget is spent under them; "
            "start over beside it with --fresh",
            field="state",
            constraint="the same settings",
        )
    return record


def put_aside(folder: Path) -> Path | None:
    """Rename the folder, so that a new one can start; a ledger is never deleted. ``None`` if there was none."""
    if not folder.exists():
        return None
    aside = folder.with_name(f"{folder.name}-until-{time.strftime('%Y%m%dT%H%M%S')}")
    folder.rename(aside)
    return aside


def _measured(raw: dict[str, Any] | None) -> Measured | None:
    if raw is None:
        return None
    return Measured(perplexity=float(raw["perplexity"]), samples=tuple(raw["samples"]))

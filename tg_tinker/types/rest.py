"""Pages of runs and checkpoints, in the shape of the public API's REST client."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from tg_tinker.types.results import Ready


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """Where a page stands; ``total_count`` of the whole list."""

    offset: int
    limit: int
    total_count: int


@dataclass(kw_only=True)
class Checkpoint(Ready):
    """A checkpoint.

    Attributes:
        checkpoint_type: "training" or "sampler".
        tinker_path: its path, ``tg://...``.
        expires_at: ``None``: kept until it is deleted.
    """

    checkpoint_id: str
    checkpoint_type: str
    time: datetime
    tinker_path: str
    size_bytes: int
    expires_at: datetime | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class TrainingRun(Ready):
    """A run, with its newest checkpoints where one is asked for alone."""

    training_run_id: str
    base_model: str
    is_lora: bool
    lora_rank: int | None
    status: str
    step: int
    created: datetime
    last_request_time: datetime
    corrupted: bool = False
    user_metadata: dict[str, Any] = field(default_factory=dict)
    last_checkpoint: Checkpoint | None = None
    last_sampler_checkpoint: Checkpoint | None = None


@dataclass(kw_only=True)
class TrainingRunsResponse(Ready):
    """A page of runs, newest first."""

    training_runs: list[TrainingRun]
    cursor: Cursor


@dataclass(kw_only=True)
class CheckpointsListResponse(Ready):
    """A page of checkpoints, newest first."""

    checkpoints: list[Checkpoint]
    cursor: Cursor

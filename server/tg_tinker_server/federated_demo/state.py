"""What the federated demo remembers in its folder between two calls: where each arm stands, and what was found.

Budgets belong to the data and are spent by the first call, so a second one shows what the first found, or goes on
where it stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from tg_tinker.errors import InvalidRequestError
from tg_tinker.federated.result import FederatedResult
from tg_tinker_server.federated_demo.settings import FederatedDemoSettings

FILE_NAME = "demo.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A model on its way: steps taken, perplexity on the held-out texts, epsilon that its data's ledger shows."""

    step: int
    perplexity: float
    epsilon: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A model that is trained for comparison. ``finished`` before all steps: its budget ended."""

    name: str
    run_id: str = ""
    points: tuple[Point, ...] = ()
    finished: bool = False

    def but(self, **changes: Any) -> Self:
        """The same with changes."""
        return replace(self, **changes)

    def at(self, point: Point) -> Self:
        """The same, further on."""
        return replace(self, points=(*(p for p in self.points if p.step < point.step), point))

    @property
    def perplexity(self) -> float:
        """Where it stands."""
        return self.points[-1].perplexity


@dataclass(slots=True, kw_only=True)
class DemoRecord:
    """The demo's memory.

    Attributes:
        settings: of the call that made it.
        job_id, expires: of the federated job.
        in_process: how it was run.
        history: of the federated model, round by round; ``epsilon`` is the largest over the sites.
        site_epsilons: by site, after each round.
        result: of the federation, once it is finished.
        arms: what it is compared with.
        seconds: of the call that finished.
    """

    settings: dict[str, Any]
    job_id: str
    expires: str
    in_process: bool
    history: tuple[Point, ...] = ()
    site_epsilons: tuple[Mapping[str, float], ...] = ()
    result: FederatedResult | None = None
    arms: tuple[Arm, ...] = ()
    finished: bool = False
    seconds: float = 0.0

    def put(self, arm: Arm) -> None:
        """Remember how an arm stands."""
        self.arms = (*(a for a in self.arms if a.name != arm.name), arm)

    def arm(self, name: str) -> Arm:
        """An arm by name."""
        return next(arm for arm in self.arms if arm.name == name)


def save_record(folder: Path, record: DemoRecord) -> None:
    """Replace the file in one move: a reader sees the old record or the new one, never half of one."""
    path = folder / FILE_NAME
    partial = path.with_suffix(".partial")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    values = {name: getattr(record, name) for name in DemoRecord.__dataclass_fields__ if name != "result"}
    values["history"] = [asdict(point) for point in record.history]
    values["arms"] = [asdict(arm) for arm in record.arms]
    values["result"] = None if record.result is None else record.result.model_dump(mode="json")
    partial.write_text(json.dumps(values), encoding="utf-8")
    os.replace(partial, path)


def load_record(folder: Path, settings: FederatedDemoSettings) -> DemoRecord | None:
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
                "history": tuple(Point(**point) for point in raw["history"]),
                "site_epsilons": tuple(raw["site_epsilons"]),
                "arms": tuple(
                    Arm(**{**arm, "points": tuple(Point(**point) for point in arm["points"])}) for arm in raw["arms"]
                ),
                "result": None if raw["result"] is None else FederatedResult.model_validate(raw["result"]),
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
            f"{folder} was made with other settings, and its budgets are spent under them; "
            "start over beside it with --fresh",
            field="state",
            constraint="the same settings",
        )
    return record

"""What a dataset's ledger adds up to: a value folded from its entries, each checked before it counts."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tg_tinker.errors import ServerError
from tg_tinker.ledger import LEDGER_DOMAIN, START, ChainEntry
from tg_tinker_server.dp.accounting import Costs, add, cost, zero
from tg_tinker_server.dp.events import Event, Gaussian, ParticipationGaussian, SampledGaussian, event_from_json
from tg_tinker_server.store.ledger_rows import LedgerRow


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """The budget, as the dataset's first entry set it. ``target_epsilon`` is ``None`` where there is no limit."""

    unit: str
    target_epsilon: float | None
    target_delta: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A schedule that a run fixed before anything was released: ``steps`` times the same event."""

    run_id: str
    event: Gaussian | SampledGaussian
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunUse:
    """What one run did on the dataset.

    Attributes:
        charges: its releases, settled or not.
        retries: charges that repeat a step whose earlier charge never got settled as released.
        releases: the largest number of releases one unit took part in, where units are counted.
        noise_multiplier: of those releases; one run counts at one noise multiplier only.
    """

    charges: int = 0
    retries: int = 0
    releases: int = 0
    noise_multiplier: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fold:
    """Everything that pricing a release needs to know. Immutable: older and newer folds can be used side by side.

    Attributes:
        position, head: of the last entry folded in.
        total: integer cost of every charge, settled or not.
        plan: the fixed schedule of the run that opened the dataset, if it asked for "prv".
        planned: charges made under that plan; all charges, as long as nothing else was released.
    """

    position: int = -1
    head: bytes = START
    terms: Terms | None = None
    total: Costs = field(default_factory=zero)
    plan: Plan | None = None
    planned: int = 0
    runs: Mapping[str, RunUse] = field(default_factory=dict)
    charges: int = 0

    def extended(self, rows: Iterable[LedgerRow]) -> Fold:
        """The fold with more entries.

        Raises:
            ServerError: an entry cannot be read or the chain is broken, with the position. An unknown never
                costs zero: nothing can be released on this dataset any more.
        """
        fold = self
        for row in rows:
            body = _checked(row, fold.position + 1, fold.head)
            try:
                fold = fold._with(body, row)
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                raise _unreadable(row, "it records something that this server does not know") from e
        return fold

    def run(self, run_id: str) -> RunUse:
        """What a run did so far."""
        return self.runs.get(run_id, RunUse())

    @property
    def by_plan_alone(self) -> bool:
        """Whether every release so far was of the plan."""
        return self.plan is not None and self.planned == self.charges

    def _with(self, body: Mapping[str, Any], row: LedgerRow) -> Fold:
        moved = replace(self, position=row.position, head=row.entry_hash)
        match body["kind"]:
            case "open":
                return moved.opened(body)
            case "charge" if self.terms is not None:
                return self._charged(moved, body)
            case "settle" if body["outcome"] in ("released", "failed"):
                return moved
            case "report" if self.terms is not None:
                return moved
        raise ValueError(f"kind {body['kind']!r} cannot stand here")

    def opened(self, body: Mapping[str, Any]) -> Fold:
        """The fold after a run registered with this body.

        Raises:
            ValueError, KeyError, TypeError: the body is not one of an "open" entry.
        """
        target, delta = float(body["target_epsilon"]), float(body["target_delta"])
        terms = Terms(
            unit=str(body["unit"]),
            target_epsilon=target if math.isfinite(target) else None,
            target_delta=delta,
        )
        if self.terms not in (None, terms) or not (0 < delta < 1 and target > 0):
            raise ValueError("an entry changes the budget")
        run_id = str(body["run_id"])
        mechanism, steps = event_from_json(body["mechanism"]), body.get("planned_steps")
        plan = self.plan
        if self.terms is None and isinstance(steps, int) and isinstance(mechanism, Gaussian | SampledGaussian):
            plan = Plan(run_id=run_id, event=mechanism, steps=steps)
        return replace(self, terms=terms, plan=plan, runs={**self.runs, run_id: self.run(run_id)})

    def _charged(self, moved: Fold, body: Mapping[str, Any]) -> Fold:
        event, accountant, run_id = event_from_json(body["event"]), body["accountant"], str(body["run_id"])
        if accountant not in ("rdp", "prv"):
            raise ValueError(f"accountant {accountant!r} is unknown")
        if accountant == "prv" and not self.follows_plan(run_id, event):
            raise ValueError("a charge claims a plan that it does not follow")
        use = self.run(run_id)
        use = replace(use, charges=use.charges + 1, retries=use.retries + (body["attempt"] > 1))
        if isinstance(event, ParticipationGaussian):
            use = replace(use, releases=use.releases + event.releases, noise_multiplier=event.noise_multiplier)
        return replace(
            moved,
            total=add(self.total, cost(event)),
            planned=self.planned + (accountant == "prv"),
            charges=self.charges + 1,
            runs={**self.runs, run_id: use},
        )

    def follows_plan(self, run_id: str, event: Event) -> bool:
        """Whether a release would be the next one of the plan, with nothing else released before it."""
        plan = self.plan
        return (
            plan is not None
            and self.by_plan_alone
            and plan.run_id == run_id
            and plan.event == event
            and self.planned < plan.steps
        )


def _checked(row: LedgerRow, position: int, head: bytes) -> dict[str, Any]:
    """The row's body, if its hash, its place in the chain and its columns agree."""
    if hashlib.sha256(LEDGER_DOMAIN + row.body_json.encode()).digest() != row.entry_hash:
        raise _unreadable(row, "its content was changed")
    body = json.loads(row.body_json)
    follows = body.get("position") == position == row.position and body.get("prev_hash") == head.hex()
    columns = tuple(
        body.get(k, d) for k, d in (("dataset_id", ""), ("kind", ""), ("run_id", ""), ("seq", 0), ("attempt", 0))
    )
    if not follows or columns != (row.dataset_id, row.kind, row.run_id, row.seq, row.attempt):
        raise _unreadable(row, "it does not follow the entry before it")
    return dict(body)


def _unreadable(row: LedgerRow, why: str) -> ServerError:
    return ServerError(
        f"the ledger of dataset {row.dataset_id!r} cannot be trusted at position {row.position}: {why}. Nothing is "
        "released on it; restore the database or take a new dataset id",
        details={"position": row.position},
    )


def entry_of(row: LedgerRow) -> ChainEntry:
    """The row as an entry that can be handed out."""
    return ChainEntry(json.loads(row.body_json), row.entry_hash)

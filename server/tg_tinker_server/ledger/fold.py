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
    """The budget in force: as the first entry set it, or the last raise. ``target_epsilon`` ``None``: no limit."""

    unit: str
    target_epsilon: float | None
    target_delta: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A schedule that a run fixed before anything was released: ``steps`` times the same event.

    ``target_epsilon`` is the one it began under; what share of delta the plan takes depends on it, for ever. A later
    raise would make that share smaller, and with it what was spent.
    """

    run_id: str
    event: Gaussian | SampledGaussian
    steps: int
    target_epsilon: float | None


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
        slots: privacy units of a registered dataset, from which the server draws; ``None`` for any other.
        last_raise: the request that raised the target last, and to what.
        audits: results of empirical audits.
        epsilon_text: what the last charge says that the dataset has spent.
    """

    position: int = -1
    head: bytes = START
    terms: Terms | None = None
    total: Costs = field(default_factory=zero)
    plan: Plan | None = None
    planned: int = 0
    runs: Mapping[str, RunUse] = field(default_factory=dict)
    charges: int = 0
    slots: int | None = None
    last_raise: tuple[str, float] | None = None
    audits: int = 0
    epsilon_text: str = "0.0"

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
            case "settle" | "erase" if self._changes_no_price(body):
                return moved
            case "register" if self.position == -1:
                return _registered(moved, body)
            case "raise" if self.terms is not None:
                return _raised(moved, self.terms, body)
            case "report" | "audit" as kind if self.terms is not None:
                return replace(moved, audits=self.audits + (kind == "audit"))
        raise ValueError(f"kind {body['kind']!r} cannot stand here")

    def _changes_no_price(self, body: Mapping[str, Any]) -> bool:
        if body["kind"] == "settle":
            return body["outcome"] in ("released", "failed")
        return self.slots is not None and isinstance(body["records"], int) and body["records"] >= 0

    def opened(self, body: Mapping[str, Any]) -> Fold:
        """The fold after a run registered with this body.

        Raises:
            ValueError, KeyError, TypeError: the body is not one of an "open" entry.
        """
        terms = _terms(body)
        if self.terms not in (None, terms):
            raise ValueError("an entry changes the budget")
        run_id = str(body["run_id"])
        mechanism, steps = event_from_json(body["mechanism"]), body.get("planned_steps")
        plan = self.plan
        if not self.runs and isinstance(steps, int) and isinstance(mechanism, Gaussian | SampledGaussian):
            plan = Plan(run_id=run_id, event=mechanism, steps=steps, target_epsilon=terms.target_epsilon)
        return replace(self, terms=terms, plan=plan, runs={**self.runs, run_id: self.run(run_id)})

    def _charged(self, moved: Fold, body: Mapping[str, Any]) -> Fold:
        event, accountant, run_id = event_from_json(body["event"]), body["accountant"], str(body["run_id"])
        if isinstance(event, SampledGaussian) and (event.vouched_by == "server") != (self.slots is not None):
            raise ValueError("somebody vouches for a draw that they cannot have made")
        if accountant not in ("rdp", "prv"):
            raise ValueError(f"accountant {accountant!r} is unknown")
        if accountant == "prv" and not self.follows_plan(run_id, event):
            raise ValueError("a charge claims a plan that it does not follow")
        use = self.run(run_id)
        use = replace(use, charges=use.charges + 1, retries=use.retries + (body["attempt"] > 1))
        if isinstance(event, ParticipationGaussian):
            _refuse_odd_count(self.run(run_id), event)
            use = replace(use, releases=use.releases + event.releases, noise_multiplier=event.noise_multiplier)
        return replace(
            moved,
            total=add(self.total, cost(event)),
            planned=self.planned + (accountant == "prv"),
            charges=self.charges + 1,
            runs={**self.runs, run_id: use},
            epsilon_text=str(body["epsilon_after"]),
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


def _refuse_odd_count(use: RunUse, event: ParticipationGaussian) -> None:
    """A count begins by costing a release, grows by one at most, and prices one noise multiplier."""
    begins = use.noise_multiplier is None
    if event.releases > 1 or (begins and event.releases == 0):
        raise ValueError("a count of participation grows as no step makes it grow")
    if not begins and use.noise_multiplier != event.noise_multiplier:
        raise ValueError("one count prices two noise multipliers")


def _terms(body: Mapping[str, Any]) -> Terms:
    target, delta = float(body["target_epsilon"]), float(body["target_delta"])
    if not (0 < delta < 1 and target > 0):
        raise ValueError("an entry sets an impossible budget")
    found = target if math.isfinite(target) else None
    return Terms(unit=str(body["unit"]), target_epsilon=found, target_delta=delta)


def _registered(moved: Fold, body: Mapping[str, Any]) -> Fold:
    slots = body["slots"]
    if not isinstance(slots, int) or slots < 1:
        raise ValueError("a dataset is registered without units")
    return replace(moved, terms=_terms(body), slots=slots)


def _raised(moved: Fold, terms: Terms, body: Mapping[str, Any]) -> Fold:
    target = float(body["target_epsilon"])
    if terms.target_epsilon is None or not (math.isfinite(target) and target > terms.target_epsilon):
        raise ValueError("an entry lowers the budget")
    raised = replace(terms, target_epsilon=target)
    return replace(moved, terms=raised, last_raise=(str(body["request_id"]), target))


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

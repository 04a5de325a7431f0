"""What a dataset's ledger tells, read from its entries alone: terms, runs, releases, and who changed what.

Both sides use it: the server to write a report, whoever verifies one to see whether the report says what its
entries say. It computes no epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from tg_tinker.errors import InvalidRequestError
from tg_tinker.ledger.audits import MAX_AUDITS, check_summary
from tg_tinker.ledger.releases import Release, count_of, decimal_of, text_of

NEIGHBOURS: Final = "add-or-remove-one"
ACCOUNTANTS: Final = ("rdp", "prv")
_ROUNDING: Final = 1e-9  # between an epsilon and the same one computed on another processor; relative above 1
_COMMON: Final = frozenset({"kind", "dataset_id", "position", "prev_hash", "time"})
_TERMS: Final = frozenset({"run_id", "unit", "neighbours", "target_epsilon", "target_delta"})
_STEP: Final = frozenset({"run_id", "seq", "attempt"})
_ACT: Final = frozenset({"run_id", "seq", "actor"})
_CHAIN: Final = frozenset({"dataset_id", "prev_hash", "run_id", "seq", "request_id"})  # of no interest to a reader

# What an entry of each kind holds, and what it may hold. A field outside these could mean anything.
FIELDS: Final[Mapping[str, tuple[frozenset[str], frozenset[str]]]] = {
    "register": (_TERMS | {"slots", "actor"}, frozenset()),
    "raise": (_ACT | {"from_epsilon", "target_epsilon", "reason", "request_id"}, frozenset()),
    "erase": (_ACT | {"records", "whole"}, frozenset()),
    "open": (_TERMS | {"mechanism"}, frozenset({"initial_weights", "planned_steps", "custom_loss"})),
    "charge": (_STEP | {"event", "unit", "neighbours", "accountant", "delta", "epsilon_after"}, frozenset()),
    "settle": (_STEP | {"charge_position", "outcome", "update_hash"}, frozenset()),
    "audit": (_ACT | {"result"}, frozenset()),
    "report": (frozenset({"run_id", "seq", "epsilon", "delta", "charges"}), frozenset()),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """The budget in force: the unit it protects, ``target_epsilon`` (inf: no limit) at ``target_delta``."""

    unit: str
    target_epsilon: float
    target_delta: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A schedule that the dataset's first run fixed before anything was released, under the target of that time."""

    run_id: str
    release: Release
    steps: int
    target_epsilon: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """One release that was paid for; ``epsilon_after`` is what the ledger says the dataset had spent then."""

    position: int
    run_id: str
    time: str
    release: Release
    event: Mapping[str, Any]
    accountant: str
    epsilon_after: float
    epsilon_text: str


@dataclass(slots=True, kw_only=True)
class Run:
    """What one run did on the dataset; ``weights`` "public": it began with weights that the client calls public.

    ``custom_loss`` "independent": by the client's word its own losses were computed from one unit at a time.
    ``counted``: the noise multiplier at which participation is counted; ``None`` before the first such step.
    """

    run_id: str
    charged: int = 0
    released: int = 0
    failed: int = 0
    weights: str = "base"
    custom_loss: str = "refuse"
    counted: float | None = None

    @property
    def unsettled(self) -> int:
        """Charges of which nobody knows how they ended; they count in full."""
        return self.charged - self.released - self.failed


@dataclass(slots=True, kw_only=True)
class History:
    """A ledger that was read.

    Attributes:
        slots: privacy units of a registered dataset, from which the server draws; ``None`` for any other.
        changes: registrations, raises and erasures, as their entries have them.
        audits: results of empirical audits, oldest first, as their entries have them.
        reports: earlier reports that were signed, and this one.
    """

    dataset_id: str
    terms: Terms | None = None
    slots: int | None = None
    plan: Plan | None = None
    charges: list[Charge] = field(default_factory=list)
    runs: dict[str, Run] = field(default_factory=dict)
    changes: list[Mapping[str, Any]] = field(default_factory=list)
    audits: list[Mapping[str, Any]] = field(default_factory=list)
    reports: list[Mapping[str, Any]] = field(default_factory=list)
    entries: int = 0
    _unsettled: dict[int, tuple[str, int, int]] = field(default_factory=dict)
    _released: set[tuple[str, int]] = field(default_factory=set)
    _attempts: dict[tuple[str, int], int] = field(default_factory=dict)

    @property
    def releases(self) -> list[Release]:
        """Of all charges, settled or not."""
        return [c.release for c in self.charges]

    @property
    def epsilon_spent(self) -> float:
        """Epsilon of everything, as the last charge recorded it."""
        return self.charges[-1].epsilon_after if self.charges else 0.0

    @property
    def accountant(self) -> str:
        """Who priced the last charge."""
        return self.charges[-1].accountant if self.charges else "rdp"

    @property
    def in_force(self) -> Terms:
        """The terms.

        Raises:
            InvalidRequestError: no entry set any.
        """
        if self.terms is None:
            raise refused_at(self.entries, "no entry before it says what the budget is")
        return self.terms

    def read_on(self, bodies: Iterable[Mapping[str, Any]]) -> History:
        """Take in the next entries; the same history.

        Raises:
            InvalidRequestError: one does not fit, with its position. An unknown never counts as nothing.
        """
        for body in bodies:
            try:
                self.follow(body)
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                raise refused_at(self.entries, str(e)) from e
        return self

    def follow(self, body: Mapping[str, Any]) -> None:
        """Take in the next entry.

        Raises:
            ValueError: it does not fit, saying why.
        """
        kind = text_of(body.get("kind"), "kind")
        if kind not in FIELDS:
            raise ValueError(f"it is of kind {kind!r}, which this version of tg-tinker does not know")
        needed, allowed = FIELDS[kind]
        extra, missing = set(body) - needed - allowed - _COMMON, (needed | _COMMON) - set(body)
        if extra or missing:
            fault = f"has unknown fields {sorted(extra)}" if extra else f"lacks the fields {sorted(missing)}"
            raise ValueError(f"it is of kind {kind!r} and {fault}")
        if count_of(body["position"], "position") != self.entries:
            raise ValueError(f"it says it stands at {body['position']}")
        if body["dataset_id"] != self.dataset_id:
            raise ValueError(f"it belongs to dataset {body['dataset_id']!r}")
        text_of(body["time"], "time")
        match kind:
            case "register":
                self._registered(body)
            case "raise":
                self._raised(body)
            case "erase":
                self._erased(body)
            case "open":
                self._opened(body)
            case "charge":
                self._charged(body)
            case "settle":
                self._settled(body)
            case "audit":
                self._audited(body)
            case "report":
                self._reported(body)
        self.entries += 1

    def _registered(self, body: Mapping[str, Any]) -> None:
        if self.entries:
            raise ValueError("it registers a dataset that has entries already")
        self.terms, self.slots = _terms(body), count_of(body["slots"], "slots")
        if not self.slots:
            raise ValueError("it registers a dataset without units")
        self._changed(body)

    def _raised(self, body: Mapping[str, Any]) -> None:
        terms, target = self.in_force, decimal_of(body["target_epsilon"], "target_epsilon")
        if decimal_of(body["from_epsilon"], "from_epsilon") != terms.target_epsilon or target <= terms.target_epsilon:
            raise ValueError(f"it changes the target from {terms.target_epsilon} to {target}, which is no raise")
        text_of(body["reason"], "reason")
        self.terms = replace(terms, target_epsilon=target)
        self._changed(body)

    def _erased(self, body: Mapping[str, Any]) -> None:
        count_of(body["records"], "records")
        if self.slots is None or not isinstance(body["whole"], bool):
            raise ValueError("it erases from a dataset that is not registered")
        self._changed(body)

    def _changed(self, body: Mapping[str, Any]) -> None:
        text_of(body["actor"], "actor")
        self.changes.append({k: v for k, v in body.items() if k not in _CHAIN})

    def _opened(self, body: Mapping[str, Any]) -> None:
        terms, run_id = _terms(body), text_of(body["run_id"], "run_id")
        if self.terms not in (None, terms):
            raise ValueError("it changes the budget")
        if run_id in self.runs:
            raise ValueError(f"it opens run {run_id!r} again")
        weights, steps = body.get("initial_weights", "base"), body.get("planned_steps")
        release = Release.from_json(body["mechanism"])
        if steps is not None and not self.runs and release.kind in ("gaussian", "sampled_gaussian"):
            planned = count_of(steps, "planned_steps")
            self.plan = Plan(run_id=run_id, release=release, steps=planned, target_epsilon=terms.target_epsilon)
        self.terms = terms
        losses = text_of(body.get("custom_loss", "refuse"), "custom_loss")
        self.runs[run_id] = Run(run_id=run_id, weights=text_of(weights, "initial_weights"), custom_loss=losses)

    def _charged(self, body: Mapping[str, Any]) -> None:
        terms, run = self.in_force, self._run(body)
        spent = decimal_of(body["epsilon_after"], "epsilon_after", infinite=True)
        same = body["unit"] == terms.unit and body["neighbours"] == NEIGHBOURS
        if not same or decimal_of(body["delta"], "delta") != terms.target_delta:
            raise ValueError("its unit, neighbours or delta are not those of the dataset")
        if spent > terms.target_epsilon:
            raise ValueError(f"it goes to epsilon {spent}, over the {terms.target_epsilon} in force")
        if body["accountant"] not in ACCOUNTANTS:
            raise ValueError(f"its accountant {body['accountant']!r} is not known to this version of tg-tinker")
        seq, attempt = count_of(body["seq"], "seq"), count_of(body["attempt"], "attempt")
        if (run.run_id, seq) in self._released:
            raise ValueError(f"it charges step {seq} of {run.run_id}, which was released before")
        before = self._attempts.get((run.run_id, seq), 0)
        if attempt != before + 1:
            raise ValueError(f"it is attempt {attempt} at step {seq} of {run.run_id}, and {before} come before it")
        release = Release.from_json(body["event"])
        self._check_draw(release)
        _count(run, release)
        run.charged += 1
        self._attempts[run.run_id, seq] = attempt
        self._unsettled[self.entries] = run.run_id, seq, attempt
        self.charges.append(
            Charge(
                position=self.entries,
                run_id=run.run_id,
                time=body["time"],
                release=release,
                event=body["event"],
                accountant=body["accountant"],
                epsilon_after=spent,
                epsilon_text=body["epsilon_after"],
            )
        )

    def _settled(self, body: Mapping[str, Any]) -> None:
        run, outcome = self._run(body), body["outcome"]
        step = run.run_id, count_of(body["seq"], "seq"), count_of(body["attempt"], "attempt")
        if self._unsettled.pop(count_of(body["charge_position"], "charge_position"), None) != step:
            raise ValueError("it settles what was not charged before it, or was settled already")
        if self._attempts[step[:2]] != step[2]:
            raise ValueError("it settles a charge that was made again since")
        if outcome == "released":
            run.released += 1
            self._released.add(step[:2])
        elif outcome == "failed":
            run.failed += 1
        else:
            raise ValueError(f"its outcome {outcome!r} is not known to this version of tg-tinker")

    def _reported(self, body: Mapping[str, Any]) -> None:
        spent = decimal_of(body["epsilon"], "epsilon", infinite=True)
        if decimal_of(body["delta"], "delta") != self.in_force.target_delta:
            raise ValueError("it reports another delta than the dataset's")
        if count_of(body["charges"], "charges") != len(self.charges):
            raise ValueError(f"it reports {body['charges']} charges, and {len(self.charges)} come before it")
        if not math.isclose(spent, self.epsilon_spent, rel_tol=_ROUNDING, abs_tol=_ROUNDING):
            raise ValueError(f"it reports epsilon {spent}, and the last charge brought it to {self.epsilon_spent}")
        self.reports.append(body)

    def _audited(self, body: Mapping[str, Any]) -> None:
        _ = self.in_force
        text_of(body["actor"], "actor")
        if len(self.audits) >= MAX_AUDITS:
            raise ValueError(f"it attaches an audit after {MAX_AUDITS} others, the most that a dataset can have")
        check_summary(body["result"])
        self.audits.append({k: v for k, v in body.items() if k not in _CHAIN})

    def _check_draw(self, release: Release) -> None:
        """Who may vouch: the server for draws from registered datasets, and there nobody else."""
        if release.vouched_by == "server" and self.slots is None:
            raise ValueError("the server vouches for a draw that it cannot have made")
        if release.vouched_by == "client" and self.slots is not None:
            raise ValueError("a client vouches for a draw from a registered dataset, from which the server draws")

    def _run(self, body: Mapping[str, Any]) -> Run:
        run = self.runs.get(text_of(body["run_id"], "run_id"))
        if run is None:
            raise ValueError(f"it is of run {body['run_id']!r}, which was not opened before it")
        return run


def read_history(dataset_id: str, bodies: Iterable[Mapping[str, Any]]) -> History:
    """What the entries of one dataset tell, from the first on.

    Raises:
        InvalidRequestError: see :meth:`History.read_on`.
    """
    return History(dataset_id=dataset_id).read_on(bodies)


def _count(run: Run, release: Release) -> None:
    """Follow a count of participation: it begins by costing a release, and prices one noise multiplier only."""
    if release.kind != "participation_gaussian":
        return
    if run.counted is None and release.times == 0:
        raise ValueError("it costs nothing, and no counted step of its run comes before it")
    if run.counted not in (None, release.noise_multiplier):
        raise ValueError(f"it counts at noise multiplier {release.noise_multiplier}, and its run at {run.counted}")
    run.counted = release.noise_multiplier


def _terms(body: Mapping[str, Any]) -> Terms:
    terms = Terms(
        unit=text_of(body["unit"], "unit"),
        target_epsilon=decimal_of(body["target_epsilon"], "target_epsilon", infinite=True),
        target_delta=decimal_of(body["target_delta"], "target_delta"),
    )
    if body["neighbours"] != NEIGHBOURS:
        raise ValueError(f"its neighbours are {body['neighbours']!r}, not {NEIGHBOURS!r}")
    if not (0 < terms.target_delta < 1 and terms.target_epsilon > 0):
        raise ValueError("its budget is none")
    return terms


def refused_at(position: int, why: str) -> InvalidRequestError:
    """The error about one entry."""
    return InvalidRequestError(
        f"the ledger is wrong at position {position}: {why}",
        field="entries",
        constraint="entries that this version of tg-tinker knows, in order",
        details={"position": position},
    )

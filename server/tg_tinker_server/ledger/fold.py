"""A dataset's budget as a fold over its entries; kept in memory only as far as the entries prove it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from tg_tinker.errors import ServerError
from tg_tinker.ledger import LEDGER_DOMAIN, START, ChainEntry, entry_hash
from tg_tinker_server.dp.accounting import Costs, add, cost, epsilon, prv_epsilon, repeated, zero
from tg_tinker_server.dp.events import Event, Gaussian, SampledGaussian, event_from_json
from tg_tinker_server.store.ledger_rows import LedgerRow

UNSETTLED, RELEASED, FAILED = "unsettled", "released", "failed"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fold:
    """What a ledger adds up to.

    Attributes:
        total: integer cost of every charge, settled or not.
        attempts: (run, seq) -> how often it was charged, and what became of the last time.
        schedule: the one (run, event) behind every charge, while there is only one; PRV needs that.
        charges: how many there are.
        accountant: named by the newest charge.
    """

    position: int = -1
    head: bytes = START
    total: Costs = field(default_factory=zero)
    attempts: dict[tuple[str, int], tuple[int, str]] = field(default_factory=dict)
    positions: dict[int, tuple[str, int]] = field(default_factory=dict)
    schedule: tuple[str, Event] | None = None
    charges: int = 0
    accountant: str = "rdp"

    def extended(self, rows: Iterable[LedgerRow]) -> Fold:
        """The fold with more entries. The dictionaries are shared and grow: drop the old fold.

        Raises:
            ServerError: an entry cannot be read or the chain is broken. An unknown never costs zero.
        """
        fold = self
        for row in rows:
            fold = fold._one(row)
        return fold

    def _one(self, row: LedgerRow) -> Fold:
        body = _checked(row, self.position + 1, self.head)
        moved = replace(self, position=row.position, head=row.entry_hash)
        if row.kind == "charge":
            event = _event(row, body)
            key = (row.run_id, row.seq)
            self.attempts[key] = (row.attempt, UNSETTLED)
            self.positions[row.position] = key
            same = self.charges == 0 or self.schedule == (row.run_id, event)
            return replace(
                moved,
                total=add(self.total, cost(event)),
                schedule=(row.run_id, event) if same else None,
                charges=self.charges + 1,
                accountant=str(body["accountant"]),
            )
        if row.kind == "settle":
            key = self.positions.pop(int(body["charge_position"]))
            attempt, _ = self.attempts[key]
            self.attempts[key] = (attempt, str(body["outcome"]))
        elif row.kind != "open":
            raise _unreadable(row, f"kind {row.kind!r} is unknown")
        return moved

    def epsilon_now(self, *, accountant: str, delta: float) -> float:
        """Epsilon of everything charged so far."""
        schedule = self.schedule
        if schedule is None:
            return epsilon(self.total, delta)
        return self.epsilon_with(schedule[1], 0, run_id=schedule[0], accountant=accountant, delta=delta)[0]

    def epsilon_with(
        self, event: Event, times: int, *, run_id: str, accountant: str, delta: float
    ) -> tuple[float, str]:
        """Epsilon after ``times`` more of an event, and the accountant that says so.

        "prv" holds while every charge is the same event of the same run, fixed in advance; otherwise "rdp".
        """
        by_rdp = epsilon(add(self.total, repeated(cost(event), times)), delta)
        alone = self.charges == 0 or self.schedule == (run_id, event)
        if accountant != "prv" or not alone or not isinstance(event, Gaussian | SampledGaussian):
            return by_rdp, "rdp"
        rate = event.sample_rate if isinstance(event, SampledGaussian) else 1.0
        by_prv = prv_epsilon(event.noise_multiplier, rate, self.charges + times, delta)
        return min(by_rdp, by_prv), "prv"


def _checked(row: LedgerRow, position: int, head: bytes) -> dict[str, Any]:
    try:
        body = json.loads(row.body_json)
        intact = entry_hash(LEDGER_DOMAIN, body) == row.entry_hash
    except (ValueError, TypeError) as e:
        raise _unreadable(row, "it is not canonical JSON") from e
    follows = body.get("position") == position == row.position and body.get("prev_hash") == head.hex()
    columns = (body.get("kind"), body.get("run_id"), body.get("seq", 0), body.get("attempt", 0))
    if not (intact and follows and columns == (row.kind, row.run_id, row.seq, row.attempt)):
        raise _unreadable(row, "the chain is broken there")
    return dict(body)


def _event(row: LedgerRow, body: dict[str, Any]) -> Event:
    try:
        return event_from_json(body["event"])
    except (ValueError, KeyError, TypeError) as e:
        raise _unreadable(row, "it records a release this server does not know") from e


def _unreadable(row: LedgerRow, why: str) -> ServerError:
    return ServerError(
        f"the ledger of dataset {row.dataset_id!r} cannot be trusted at position {row.position}: {why}. Nothing is "
        "released on it; restore the database or take a new dataset id",
        details={"position": row.position},
    )


def entry_of(row: LedgerRow) -> ChainEntry:
    """The row as an entry that can be handed out."""
    return ChainEntry(json.loads(row.body_json), row.entry_hash)

"""Spends privacy: reserve before anything is released, settle after; the budget belongs to the dataset."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, Literal

from tg_tinker.errors import DPBudgetExceededError, InvalidRequestError, ResourceNotFoundError, ServerError
from tg_tinker.ledger import LEDGER_DOMAIN, ChainEntry, LedgerEntry
from tg_tinker_server.dp import calibration
from tg_tinker_server.dp.accounting import add, cost, repeated
from tg_tinker_server.dp.calibration import Forecast
from tg_tinker_server.dp.events import Event, ParticipationGaussian, event_to_json
from tg_tinker_server.ledger.fold import RELEASED, Fold, entry_of
from tg_tinker_server.ledger.reservation import MINT, NEIGHBOURS, DatasetScope, Reservation, Spent
from tg_tinker_server.store import ledger_rows as rows
from tg_tinker_server.store.database import Database, Transaction


class PrivacyLedger:
    """Every dataset's budget.

    Guarantees: a charge is on disk before ``reserve`` returns; the fold over all charges of the dataset, settled
    or not, and the append happen in one transaction, so that no number of runs, servers or crashes can spend more
    than the target; nothing gives budget back.
    """

    def __init__(self, db: Database, *, clock: Callable[[], datetime]) -> None:
        self._db = db
        self._clock = clock
        self._folds: dict[DatasetScope, Fold] = {}
        self._lock = threading.RLock()

    def open_dataset(
        self,
        scope: DatasetScope,
        *,
        run_id: str,
        target_epsilon: float | None,
        target_delta: float,
        unit: str,
        accountant: str,
        mechanism: Event,
    ) -> None:
        """Register a run on a dataset; the first one sets the budget.

        Raises:
            InvalidRequestError: the dataset has another target, delta or unit.
            DPBudgetExceededError: not one step is affordable.
        """

        def write(tx: Transaction) -> None:
            row = rows.get_dataset(tx, scope.tenant, scope.dataset_id)
            if row is None:
                row = rows.DatasetRow(
                    tenant=scope.tenant,
                    dataset_id=scope.dataset_id,
                    unit=unit,
                    target_epsilon=target_epsilon,
                    target_delta=target_delta,
                    created=self._clock(),
                )
                rows.insert_dataset(tx, row)
            _refuse_other_terms(row, target_epsilon, target_delta, unit)
            fold = self._fold(tx, scope)
            self._price(fold, row, _first(mechanism), run_id=run_id, accountant=accountant)
            body = {
                "run_id": run_id,
                "unit": unit,
                "neighbours": NEIGHBOURS,
                "target_epsilon": "inf" if target_epsilon is None else repr(target_epsilon),
                "target_delta": repr(target_delta),
                "mechanism": event_to_json(mechanism),
            }
            self._append(tx, scope, fold, "open", body)

        self._db.write(write)

    def reserve(
        self,
        scope: DatasetScope,
        *,
        run_id: str,
        seq: int,
        event: Event,
        accountant: str,
        unit_macs: Sequence[bytes] = (),
        max_participation: int | None = None,
    ) -> Reservation:
        """Pay for one release. When this returns the charge is on disk; when it raises, nothing was charged.

        With ``max_participation`` the server counts in how many releases of the run each unit took part, and the
        charge is by how much the largest count grows.

        Raises:
            DPBudgetExceededError: the dataset would go over its target.
            InvalidRequestError: a unit would take part too often.
            ServerError: this step was released before, or the ledger cannot be read.
        """

        def write(tx: Transaction) -> Reservation:
            row = self._dataset(tx, scope)
            fold = self._fold(tx, scope)
            attempt, outcome = fold.attempts.get((run_id, seq), (0, ""))
            if outcome == RELEASED:
                raise ServerError(
                    f"step {seq} of {run_id} was released before; its noise is not drawn again",
                    details={"aborted": True},
                )
            charged = event
            if max_participation is not None:
                charged = self._participate(tx, scope, run_id, event, unit_macs, max_participation)
            before, after, used = self._price(fold, row, charged, run_id=run_id, accountant=accountant)
            body = {
                "run_id": run_id,
                "seq": seq,
                "attempt": attempt + 1,
                "event": event_to_json(charged),
                "unit": row.unit,
                "neighbours": NEIGHBOURS,
                "accountant": used,
                "delta": repr(row.target_delta),
                "epsilon_after": repr(after),
            }
            entry = self._append(tx, scope, fold, "charge", body)
            return Reservation(
                scope=scope,
                run_id=run_id,
                seq=seq,
                attempt=attempt + 1,
                event=charged,
                accountant=used,
                position=entry.position,
                entry_hash=entry.entry_hash,
                epsilon_before=before,
                epsilon_after=after,
                delta=row.target_delta,
                mint=MINT,
            )

        return self._db.write(write)

    def settle(
        self, tx: Transaction, reservation: Reservation, *, outcome: Literal["released", "failed"], update_hash: str
    ) -> None:
        """Record what became of a charge, inside the caller's transaction. A failure is noted, never refunded.

        ``update_hash`` identifies the noised update; it is public.
        """
        scope = reservation.scope
        fold = self._fold(tx, scope)
        attempt, standing = fold.attempts.get((reservation.run_id, reservation.seq), (0, ""))
        if attempt != reservation.attempt or standing == RELEASED:
            raise ServerError(f"step {reservation.seq} of {reservation.run_id} was charged again or settled already")
        body = {
            "run_id": reservation.run_id,
            "seq": reservation.seq,
            "attempt": reservation.attempt,
            "charge_position": reservation.position,
            "outcome": outcome,
            "update_hash": update_hash,
        }
        self._append(tx, scope, fold, "settle", body)

    def spent(self, scope: DatasetScope) -> Spent:
        """What every run on the dataset has spent together."""

        def read(tx: Transaction) -> Spent:
            row = self._dataset(tx, scope)
            fold = self._fold(tx, scope)
            return Spent(
                epsilon=self._epsilon_now(fold, row, None),
                delta=row.target_delta,
                target_epsilon=row.target_epsilon,
                head=fold.head,
                entries=fold.position + 1,
                unit=row.unit,
            )

        return self._db.read(read)

    def forecast(
        self,
        scope: DatasetScope,
        *,
        run_id: str,
        event: Event,
        steps: int,
        accountant: str,
        releases_left: int | None,
    ) -> Forecast:
        """Epsilon now, after ``steps`` more of these events, and how many the target allows.

        Exact for "rdp"; for "prv" ``steps_remaining`` is the count that "rdp" allows, a lower bound.
        ``releases_left`` caps how often a counted run can still be charged.
        """

        def read(tx: Transaction) -> Forecast:
            row, fold = self._dataset(tx, scope), self._fold(tx, scope)
            priced = _first(event)
            planned = calibration.forecast(
                fold.total, priced, steps=steps, target_epsilon=row.target_epsilon, delta=row.target_delta
            )
            if releases_left is not None:
                worst = add(fold.total, repeated(cost(priced), min(steps, releases_left)))
                capped = calibration.forecast(
                    worst, priced, steps=0, target_epsilon=row.target_epsilon, delta=row.target_delta
                )
                planned = replace(planned, epsilon_after=capped.epsilon_now)
            now = self._epsilon_now(fold, row, accountant)
            later, used = fold.epsilon_with(
                priced, steps, run_id=run_id, accountant=accountant, delta=row.target_delta
            )
            if used == "prv":
                planned = replace(planned, epsilon_after=later)
            return replace(planned, epsilon_now=now)

        return self._db.read(read)

    def refusal(
        self, scope: DatasetScope, *, run_id: str, event: Event, accountant: str
    ) -> DPBudgetExceededError | None:
        """The error that one more of these events would raise, or ``None`` if it is affordable."""

        def read(tx: Transaction) -> DPBudgetExceededError | None:
            try:
                self._price(
                    self._fold(tx, scope), self._dataset(tx, scope), event, run_id=run_id, accountant=accountant
                )
            except DPBudgetExceededError as e:
                return e
            return None

        return self._db.read(read)

    def participation(self, scope: DatasetScope, run_id: str) -> int:
        """The largest number of releases any unit took part in, in this run."""
        return self._db.read(lambda tx: rows.largest_participation(tx, scope.tenant, scope.dataset_id, run_id))

    def entries(self, scope: DatasetScope) -> list[LedgerEntry]:
        """Every entry of the dataset, in order; empty if there is no such dataset."""
        return self._db.read(
            lambda tx: [entry_of(r) for r in rows.entries_after(tx, scope.tenant, scope.dataset_id, -1)]
        )

    def _dataset(self, tx: Transaction, scope: DatasetScope) -> rows.DatasetRow:
        row = rows.get_dataset(tx, scope.tenant, scope.dataset_id)
        if row is None:
            raise ResourceNotFoundError(
                "no such dataset for this tenant", resource_type="dataset", resource_id=scope.dataset_id
            )
        return row

    def _fold(self, tx: Transaction, scope: DatasetScope) -> Fold:
        """The fold as this transaction sees it; memory is only believed where the rows confirm it."""
        with self._lock:
            last = rows.last_entry(tx, scope.tenant, scope.dataset_id) or (-1, Fold().head)
            known = self._folds.pop(scope, None)
            if known is not None and last != (known.position, known.head):
                known = self._extended(tx, scope, known, last)
            if known is None:
                known = Fold().extended(rows.entries_after(tx, scope.tenant, scope.dataset_id, -1))
            self._folds[scope] = known
            return known

    def _extended(self, tx: Transaction, scope: DatasetScope, known: Fold, last: tuple[int, bytes]) -> Fold | None:
        if last[0] <= known.position:
            return None  # what was remembered was rolled back
        try:
            return known.extended(rows.entries_after(tx, scope.tenant, scope.dataset_id, known.position))
        except ServerError:
            return None  # start over from the rows; they say themselves if they are broken

    def _price(
        self, fold: Fold, row: rows.DatasetRow, event: Event, *, run_id: str, accountant: str
    ) -> tuple[float, float, str]:
        before = self._epsilon_now(fold, row, accountant)
        after, used = fold.epsilon_with(event, 1, run_id=run_id, accountant=accountant, delta=row.target_delta)
        after = max(before, after)  # the PRV bound carries a numerical error; a history never gets cheaper
        target = row.target_epsilon
        if target is not None and not after <= target:
            raise DPBudgetExceededError(
                f"step would bring {row.dataset_id} to epsilon {after:.3f}, over its {target:.3f} at delta "
                f"{row.target_delta:g}; nothing was released. Stop here, or use fresh data",
                current_epsilon=before,
                max_epsilon=target,
                delta=row.target_delta,
            )
        return before, after, used

    def _epsilon_now(self, fold: Fold, row: rows.DatasetRow, accountant: str | None) -> float:
        return fold.epsilon_now(accountant=accountant or fold.accountant, delta=row.target_delta)

    def _append(
        self, tx: Transaction, scope: DatasetScope, fold: Fold, kind: str, body: Mapping[str, Any]
    ) -> ChainEntry:
        whole = {**body, "kind": kind, "dataset_id": scope.dataset_id, "time": self._clock().isoformat()}
        entry = ChainEntry.make(LEDGER_DOMAIN, whole, position=fold.position + 1, prev_hash=fold.head)
        rows.insert_entry(
            tx,
            rows.LedgerRow(
                tenant=scope.tenant,
                dataset_id=scope.dataset_id,
                position=entry.position,
                kind=kind,
                run_id=str(body["run_id"]),
                seq=int(body.get("seq", 0)),
                attempt=int(body.get("attempt", 0)),
                body_json=entry.body_json(),
                prev_hash=entry.prev_hash,
                entry_hash=entry.entry_hash,
            ),
        )
        return entry

    def _participate(
        self, tx: Transaction, scope: DatasetScope, run_id: str, event: Event, unit_macs: Sequence[bytes], limit: int
    ) -> Event:
        if not isinstance(event, ParticipationGaussian):
            return event  # an un-noised release costs infinity however often units took part
        largest = rows.largest_participation(tx, scope.tenant, scope.dataset_id, run_id)
        old = rows.participations(tx, scope.tenant, scope.dataset_id, run_id, unit_macs)
        new = {mac: old.get(mac, 0) + 1 for mac in Counter(unit_macs)}
        over = sum(1 for count in new.values() if count > limit)
        if over:
            raise InvalidRequestError(
                f"{over} privacy units would take part in more than max_participation={limit} steps; leave them "
                "out of this batch, or end the run here",
                field="privacy_unit_ids",
                constraint=f"each unit in at most {limit} steps",
            )
        rows.set_participations(tx, scope.tenant, scope.dataset_id, run_id, old, new)
        grown = max([largest, *new.values()]) - largest
        return ParticipationGaussian(noise_multiplier=event.noise_multiplier, releases=grown)


def _first(event: Event) -> Event:
    """The event at its full price: a counted step is charged once for fresh units at the start of a run."""
    return replace(event, releases=1) if isinstance(event, ParticipationGaussian) else event


def _refuse_other_terms(row: rows.DatasetRow, epsilon: float | None, delta: float, unit: str) -> None:
    def text(value: float | None) -> str:
        return "none" if value is None or math.isinf(value) else f"{value:g}"

    here = (row.target_epsilon, row.target_delta, row.unit)
    if here != (epsilon, delta, unit):
        raise InvalidRequestError(
            f"dataset {row.dataset_id} has target epsilon {text(row.target_epsilon)}, delta {row.target_delta:g}, "
            f"unit {row.unit}; this run asks for epsilon {text(epsilon)}, delta {delta:g}, unit {unit}. A budget "
            "belongs to the dataset: use its terms",
            field="dp_config",
            constraint="the dataset's terms",
        )

"""Spends privacy: reserve before anything is released, settle after; the budget belongs to the dataset."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, Literal

from tg_tinker.errors import DPBudgetExceededError, InvalidRequestError, ResourceNotFoundError, ServerError
from tg_tinker.ledger import LEDGER_DOMAIN, ChainEntry, LedgerEntry
from tg_tinker.ledger.audits import MAX_AUDITS
from tg_tinker_server.dp.accounting import cost
from tg_tinker_server.dp.calibration import Forecast
from tg_tinker_server.dp.events import Event, ParticipationGaussian, event_to_json
from tg_tinker_server.ledger import log, pricing
from tg_tinker_server.ledger.fold import Fold, Terms, entry_of
from tg_tinker_server.ledger.folds import Folds
from tg_tinker_server.ledger.participation import BY_ID, participate
from tg_tinker_server.ledger.reservation import MINT, NEIGHBOURS, DatasetScope, Leaf, Reservation, Spent
from tg_tinker_server.ledger.terms import (
    erase_body,
    raise_body,
    refuse_other_terms,
    refuse_wrong_voucher,
    register_body,
    terms_body,
    terms_of,
)
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
        self._folds = Folds()

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
        planned_steps: int | None = None,
        initial_weights: str = "base",
        custom_loss: str = "refuse",
    ) -> None:
        """Register a run on a dataset; the first one sets the budget. Again for the same run: nothing happens.

        ``planned_steps`` fixes the run's schedule in advance, which "prv" needs: that many times ``mechanism``. Only
        the first run of a dataset can have one. ``initial_weights`` "public": the client attests where weights
        without a ledger come from. ``custom_loss`` "independent": it attests that the losses which it computes itself
        are computed from one unit at a time.

        Raises:
            InvalidRequestError: the dataset has another target, delta or unit.
            DPBudgetExceededError: not one step is affordable.
        """
        terms = terms_of(unit=unit, target_epsilon=target_epsilon, target_delta=target_delta)
        mechanism = _full_price(mechanism)
        body: dict[str, Any] = {
            "run_id": run_id,
            **terms_body(terms),
            "mechanism": event_to_json(mechanism),
            "initial_weights": initial_weights,
        }
        if accountant == "prv" and planned_steps is not None:
            body["planned_steps"] = planned_steps
        if custom_loss != "refuse":
            body["custom_loss"] = custom_loss
        fresh = Fold().opened(body)
        pricing.price(fresh, terms, mechanism, run_id=run_id, accountant=accountant)  # slow once, then cached
        self._fold_before(scope)

        def write(tx: Transaction) -> None:
            fold = self._folds.at(tx, scope)
            refuse_other_terms(scope, fold.terms, terms)
            refuse_wrong_voucher(scope, fold, mechanism)
            if run_id in fold.runs:
                return
            found = pricing.price(fold.opened(body), terms, mechanism, run_id=run_id, accountant=accountant)
            pricing.refuse_over(found, terms, scope.dataset_id)
            if fold.terms is None:
                self._insert_dataset(tx, scope, terms)
            self._append(tx, scope, fold, "open", body)

        self._db.write(write)

    def register(self, tx: Transaction, scope: DatasetScope, *, terms: Terms, slots: int, actor: str) -> None:
        """Set a registered dataset's terms, inside the caller's transaction and before any run.

        Args:
            slots: privacy units; every draw is over all of them, for ever.
            actor: id of the key that asked.

        Raises:
            InvalidRequestError: the name has a ledger already, or the terms cannot be.
        """
        fold = self._folds.at(tx, scope)
        body = register_body(scope, fold, terms, slots=slots, actor=actor)
        self._insert_dataset(tx, scope, terms)
        self._append(tx, scope, fold, "register", body)

    def raise_target(
        self, scope: DatasetScope, *, target_epsilon: float, reason: str, actor: str, request_id: str
    ) -> None:
        """Raise a dataset's target. What was spent stays spent. The same request again changes nothing.

        Raises:
            ResourceNotFoundError: there is no such dataset.
            InvalidRequestError: not larger than the target in force.
        """

        def write(tx: Transaction) -> None:
            fold, terms = self._opened(tx, scope)
            if fold.last_raise == (request_id, target_epsilon):
                return
            asked = {"target_epsilon": target_epsilon, "reason": reason, "actor": actor, "request_id": request_id}
            body = raise_body(scope, fold, terms, **asked)  # type: ignore[arg-type]
            self._append(tx, scope, fold, "raise", body)
            rows.raise_dataset(tx, scope.tenant, scope.dataset_id, target_epsilon)

        self._db.write(write)

    def note_erasure(
        self, tx: Transaction, scope: DatasetScope, *, records: int, actor: str, whole: bool = False
    ) -> None:
        """Record, inside the caller's transaction, that records of a registered dataset were erased.

        ``whole``: all that were left, and nothing is ever drawn from it again.
        """
        fold, _ = self._opened(tx, scope)
        self._append(tx, scope, fold, "erase", erase_body(fold, records=records, whole=whole, actor=actor))

    def reserve(
        self,
        scope: DatasetScope,
        *,
        run_id: str,
        seq: int,
        event: Event,
        accountant: str,
        unit_macs: Sequence[bytes] = (),
        unit_naming: str = BY_ID,
        max_participation: int | None = None,
    ) -> Reservation:
        """Pay for one release. When this returns the charge is on disk; when it raises, nothing was charged.

        With ``max_participation`` the server counts in how many releases of the run each unit took part, and the
        charge is by how much the largest count grows. ``unit_naming`` is how the units got their names, one way for
        the whole of a run.

        Raises:
            DPBudgetExceededError: the dataset would go over its target.
            InvalidRequestError: a unit would take part too often, or is named another way than before.
            ServerError: this step was released before, or the ledger cannot be read.
        """
        if isinstance(event, ParticipationGaussian) and max_participation is None:
            raise ValueError("ParticipationGaussian needs max_participation: without counting it has no price")
        self._prepare(scope, run_id, event, accountant)

        def write(tx: Transaction) -> Reservation:
            fold, terms = self._opened(tx, scope)
            refuse_wrong_voucher(scope, fold, event)
            attempt = _attempts(rows.entries_of_step(tx, scope.tenant, scope.dataset_id, run_id, seq))
            charged = event
            if isinstance(event, ParticipationGaussian):
                assert max_participation is not None
                charged = participate(
                    tx,
                    scope,
                    run_id,
                    event,
                    use=fold.run(run_id),
                    unit_macs=unit_macs,
                    naming=unit_naming,
                    limit=max_participation,
                    retried=attempt > 0,
                )
            found = pricing.price(fold, terms, charged, run_id=run_id, accountant=accountant)
            pricing.refuse_over(found, terms, scope.dataset_id)
            body = {
                "run_id": run_id,
                "seq": seq,
                "attempt": attempt + 1,
                "event": event_to_json(charged),
                "unit": terms.unit,
                "neighbours": NEIGHBOURS,
                "accountant": found.accountant,
                "delta": repr(terms.target_delta),
                "epsilon_after": repr(found.after),
            }
            leaf = self._append(tx, scope, fold, "charge", body)
            return Reservation(
                scope=scope,
                run_id=run_id,
                seq=seq,
                attempt=attempt + 1,
                event=charged,
                accountant=found.accountant,
                leaf=leaf,
                epsilon_before=found.before,
                epsilon_after=found.after,
                delta=terms.target_delta,
                mint=MINT,
            )

        return self._db.write(write)

    def settle(
        self, tx: Transaction, reservation: Reservation, *, outcome: Literal["released", "failed"], update_hash: str
    ) -> None:
        """Record what became of a charge, inside the caller's transaction. A failure is noted, never refunded.

        ``update_hash`` identifies the noised update; it is public.
        """
        scope, run_id, seq = reservation.scope, reservation.run_id, reservation.seq
        fold = self._folds.at(tx, scope)
        step = rows.entries_of_step(tx, scope.tenant, scope.dataset_id, run_id, seq)
        if not step or step[-1].kind != "charge" or step[-1].attempt != reservation.attempt:
            raise ServerError(
                f"step {seq} of {run_id} was charged again or settled already; this outcome does not count",
                details={"aborted": True},
            )
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
            fold, terms = self._opened(tx, scope)
            return Spent(
                epsilon=pricing.epsilon_now(fold, terms),
                delta=terms.target_delta,
                target_epsilon=terms.target_epsilon,
                head=fold.head,
                entries=fold.position + 1,
                unit=terms.unit,
            )

        return self._db.read(read)

    def note_audit(self, scope: DatasetScope, *, result: Mapping[str, Any], actor: str) -> None:
        """Record what an empirical audit found (``tg_tinker.ledger.audits.summary_of``). The same again is one.

        Raises:
            ResourceNotFoundError: there is no such dataset.
            InvalidRequestError: ``MAX_AUDITS`` are recorded already.
        """

        def write(tx: Transaction) -> None:
            fold, _ = self._opened(tx, scope)
            last = rows.entries_from(tx, scope.tenant, scope.dataset_id, fold.position)
            if last and json.loads(last[0].body_json).get("result") == dict(result):
                return
            if fold.audits >= MAX_AUDITS:
                raise InvalidRequestError(
                    f"dataset {scope.dataset_id} has {MAX_AUDITS} results of audits, the most that its ledger takes",
                    field="dataset_id",
                    constraint=f"at most {MAX_AUDITS} results",
                )
            body = {"run_id": "", "seq": fold.position + 1, "actor": actor, "result": dict(result)}
            self._append(tx, scope, fold, "audit", body)

        self._db.write(write)

    def attest(self, scope: DatasetScope, *, start: int = 0) -> list[Leaf]:
        """Close a report: append an entry that states epsilon as the last charge has it, in the same characters.

        The report is signed over the tree that ends with this entry, so that one which leaves out the newest entries
        needs a lie in the log itself.

        Returns:
            every entry from position ``start`` on, that one last.
        """

        def write(tx: Transaction) -> list[Leaf]:
            fold, terms = self._opened(tx, scope)
            body = {
                "run_id": "",
                "seq": fold.position + 1,
                # Not computed again: another processor may round otherwise, and would contradict the charge.
                "epsilon": fold.epsilon_text,
                "delta": repr(terms.target_delta),
                "charges": fold.charges,
            }
            earlier = rows.entries_from(tx, scope.tenant, scope.dataset_id, start)
            last = self._append(tx, scope, fold, "report", body)
            return [*(Leaf(entry=entry_of(r), index=r.leaf_index) for r in earlier), last]

        return self._db.write(write)

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
        """Epsilon now, after ``steps`` more of these events, and how many the target allows (-1: no target).

        Exactly what those steps will be charged. ``releases_left`` caps how often a counted run can be charged; a
        counted step is taken at its full price. May take seconds for "prv".
        """
        fold, terms = self._db.read(lambda tx: self._opened(tx, scope))
        return pricing.forecast(
            fold, terms, _full_price(event), run_id=run_id, accountant=accountant, steps=steps, most=releases_left
        )

    def refusal(
        self, scope: DatasetScope, *, run_id: str, event: Event, accountant: str
    ) -> DPBudgetExceededError | None:
        """The error that one more of these events would raise, or ``None`` if it is affordable."""
        fold, terms = self._db.read(lambda tx: self._opened(tx, scope))
        try:
            found = pricing.price(fold, terms, event, run_id=run_id, accountant=accountant)
            pricing.refuse_over(found, terms, scope.dataset_id)
        except DPBudgetExceededError as e:
            return e
        return None

    def participation(self, scope: DatasetScope, run_id: str) -> int:
        """The largest number of releases any unit took part in, in this run."""
        return self._db.read(lambda tx: self._opened(tx, scope)[0].run(run_id).releases)

    def entries(self, scope: DatasetScope) -> list[LedgerEntry]:
        """Every entry of the dataset, in order; empty if there is no such dataset."""
        return self._db.read(
            lambda tx: [entry_of(r) for r in rows.entries_from(tx, scope.tenant, scope.dataset_id, 0)]
        )

    def leaves(self, scope: DatasetScope) -> list[Leaf]:
        """The same with their places in the tenant's tree."""
        found = self._db.read(lambda tx: rows.entries_from(tx, scope.tenant, scope.dataset_id, 0))
        return [Leaf(entry=entry_of(row), index=row.leaf_index) for row in found]

    def weight(self, scope: DatasetScope) -> tuple[int, int]:
        """How many entries the dataset has, and how many characters they are; reads none of them."""
        return self._db.read(lambda tx: rows.weight(tx, scope.tenant, scope.dataset_id))

    def _prepare(self, scope: DatasetScope, run_id: str, event: Event, accountant: str) -> None:
        """Do the slow arithmetic before the transaction, where it holds up nobody; the caches keep it."""
        cost(_full_price(event))
        self._fold_before(scope)
        if accountant == "prv":
            fold, terms = self._db.read(lambda tx: self._opened(tx, scope))
            pricing.price(fold, terms, event, run_id=run_id, accountant=accountant)

    def _fold_before(self, scope: DatasetScope) -> None:
        """Read a long history that is new to this server here, and not in a transaction that all others wait for."""
        if not self._folds.has(scope):
            self._db.read(lambda tx: self._folds.at(tx, scope))

    def _opened(self, tx: Transaction, scope: DatasetScope) -> tuple[Fold, Terms]:
        fold = self._folds.at(tx, scope)
        if fold.terms is None:
            raise ResourceNotFoundError(
                "no such dataset for this tenant", resource_type="dataset", resource_id=scope.dataset_id
            )
        return fold, fold.terms

    def _insert_dataset(self, tx: Transaction, scope: DatasetScope, terms: Terms) -> None:
        row = rows.DatasetRow(
            tenant=scope.tenant,
            dataset_id=scope.dataset_id,
            unit=terms.unit,
            target_epsilon=terms.target_epsilon,
            target_delta=terms.target_delta,
            created=self._clock(),
        )
        rows.insert_dataset(tx, row)

    def _append(self, tx: Transaction, scope: DatasetScope, fold: Fold, kind: str, body: Mapping[str, Any]) -> Leaf:
        whole = {**body, "kind": kind, "dataset_id": scope.dataset_id, "time": self._clock().isoformat()}
        entry = ChainEntry.make(LEDGER_DOMAIN, whole, position=fold.position + 1, prev_hash=fold.head)
        text = entry.body_json()
        leaf_index = log.append(tx, scope.tenant, text)
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
                body_json=text,
                prev_hash=entry.prev_hash,
                entry_hash=entry.entry_hash,
                leaf_index=leaf_index,
            ),
        )
        return Leaf(entry=entry, index=leaf_index)


def _attempts(step: Sequence[rows.LedgerRow]) -> int:
    """How often the step was charged.

    Raises:
        ServerError: it was released. Its noise is never drawn a second time.
    """
    for row in step:
        if row.kind == "settle" and json.loads(row.body_json)["outcome"] == "released":
            raise ServerError(
                f"step {row.seq} of {row.run_id} was released before; its noise is not drawn again",
                details={"aborted": True},
            )
    return sum(row.kind == "charge" for row in step)


def _full_price(event: Event) -> Event:
    """The event as if every unit in it were there for the largest number of times."""
    return replace(event, releases=1) if isinstance(event, ParticipationGaussian) else event

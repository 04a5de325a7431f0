"""Registered datasets: upload, describe, erase, delete; and raising a dataset's budget.

An upload becomes a dataset in the one transaction that also writes its terms into the ledger. What is deleted
goes the other way in one transaction: a note in the ledger, and the dataset's key destroyed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial

from tg_tinker.errors import InvalidRequestError, RateLimitedError, ResourceNotFoundError
from tg_tinker.types import DPConfig, TrainingConfig
from tg_tinker.types.records import Budget, DatasetInfo, NewDataset, Record
from tg_tinker.wire.runs import config_from_json, config_to_json
from tg_tinker_server.ledger.privacy_ledger import PrivacyLedger
from tg_tinker_server.ledger.reservation import DatasetScope
from tg_tinker_server.ledger.terms import terms_of
from tg_tinker_server.service.caller import Caller
from tg_tinker_server.service.dataset_keys import DatasetKeys
from tg_tinker_server.service.durability import now
from tg_tinker_server.store import dataset_rows as rows
from tg_tinker_server.store import ledger_rows
from tg_tinker_server.store.database import Database, Transaction

MAX_UPLOADS = 16  # of a tenant at a time
IDLE_UPLOAD = timedelta(hours=24)
PURGED_AT_ONCE = 2000  # records in one transaction, so that steps get their turn in between
LISTED_IDS = 100_000
INF = float("inf")


def dataset_not_found(dataset_id: str) -> ResourceNotFoundError:
    """The one answer for a missing dataset and for another tenant's."""
    return ResourceNotFoundError("no such dataset for this tenant", resource_type="dataset", resource_id=dataset_id)


def with_dataset(config: TrainingConfig, dp: DPConfig, row: rows.StoreRow | None) -> TrainingConfig:
    """A run's configuration with the size of its dataset filled in; ``row`` is ``None`` if it is not registered.

    Raises:
        InvalidRequestError: another size than was registered; none at all where "poisson" needs one; or the records
            are gone and nothing can be drawn.
    """
    poisson = dp.sampling == "poisson"
    if row is None:
        if poisson and dp.dataset_size is None:
            raise InvalidRequestError(
                f"dataset {dp.dataset_id} is not registered, so sampling='poisson' needs dataset_size; register it "
                "with service.create_dataset, or give the number of its privacy units",
                field="dp_config.dataset_size",
                constraint="given, or registered",
            )
        return config
    if poisson and row.status != rows.SEALED:
        raise InvalidRequestError(
            f"the records of dataset {row.dataset_id} were deleted; nothing can be drawn from it any more",
            field="dp_config.dataset_id",
            constraint="a registered dataset",
        )
    if dp.dataset_size not in (None, row.slots):
        raise InvalidRequestError(
            f"dataset {row.dataset_id} was registered with {row.slots} privacy units, this run says "
            f"{dp.dataset_size}; leave dataset_size out, or use dataset.dp_config()",
            field="dp_config.dataset_size",
            constraint=str(row.slots),
        )
    sized = dp.model_copy(update={"dataset_size": row.slots})
    return config_from_json(config_to_json(config.model_copy(update={"dp_config": sized})))  # checks it anew


@dataclass(frozen=True, slots=True)
class DatasetService:
    """What can be done with datasets. Everything here blocks: call it off the event loop."""

    db: Database
    ledger: PrivacyLedger
    keys: DatasetKeys
    max_bytes: int
    max_records: int

    # Uploads.

    def begin(self, tenant: str, new: NewDataset) -> int:
        """Begin an upload, or find it; says how many records are there.

        Raises:
            InvalidRequestError: the name was used before, or the dataset would be too large.
            RateLimitedError: too many unfinished uploads.
        """
        if new.num_records > self.max_records:
            raise _too_large(f"{new.num_records} records", f"{self.max_records} records")
        self.sweep()
        key = self.keys.make(tenant, new.upload_id)  # before the transaction, for it may write a tenant's first key

        def write(tx: Transaction) -> int:
            found = rows.get_upload(tx, tenant, new.upload_id)
            if found is not None:
                _require_usable(found, new.upload_id)
                _require_same(found, new)
                return found.received
            self._require_unused(tx, tenant, new.dataset_id)
            if rows.count_uploads(tx, tenant) >= MAX_UPLOADS:
                raise RateLimitedError(
                    f"{MAX_UPLOADS} uploads are not finished; finish them, or wait until they expire after "
                    f"{IDLE_UPLOAD.total_seconds() / 3600:.0f} hours",
                    retry_after=60.0,
                )
            when = now()
            row = rows.StoreRow(
                tenant=tenant,
                upload_id=new.upload_id,
                dataset_id=new.dataset_id,
                status=rows.OPEN,
                unit=new.privacy_unit,
                target_epsilon=None if new.target_epsilon == INF else new.target_epsilon,
                target_delta=new.target_delta,
                truncate=int(new.truncate),
                slots=new.num_slots,
                expected_records=new.num_records,
                received=0,
                size_bytes=0,
                records=0,
                units=0,
                key_id=key.key_id,
                wrapped_key=key.wrapped,
                created=when,
                updated=when,
            )
            rows.insert_store(tx, row)
            return 0

        return self.db.write(write)

    def append(self, tenant: str, upload_id: str, position: int, records: Sequence[tuple[bytes, int]]) -> int:
        """Add records (bytes, slot) at a position; the same ones again change nothing. Says how many are there.

        Raises:
            InvalidRequestError: a gap, other records at these positions, a slot out of order, bytes that are no
                record, or more than the limits allow.
        """
        upload = _require_usable(self.db.read(lambda tx: rows.get_upload(tx, tenant, upload_id)), upload_id)
        for data, _ in records:
            Record.from_bytes(data)
        key = self.keys.open(upload)
        sealed = [key.row(position + i, slot, data) for i, (data, slot) in enumerate(records)]
        size = sum(len(data) for data, _ in records)

        def write(tx: Transaction) -> int:
            row = _require_usable(rows.get_upload(tx, tenant, upload_id), upload_id)
            if position < row.received or row.status != rows.OPEN:
                there = rows.ids_from(tx, tenant, upload_id, position, len(sealed))
                if there != [(r.position, r.slot, r.record_id) for r in sealed]:
                    raise _wrong_place(row.received)
                return row.received
            if position > row.received:
                raise _wrong_place(row.received)
            received = position + len(sealed)
            if received > row.expected_records:
                raise _too_large(f"{received} records", f"{row.expected_records} records that were announced")
            if row.size_bytes + size > self.max_bytes:
                raise _too_large(f"{row.size_bytes + size} bytes", f"{self.max_bytes} bytes")
            units = _units_after(row, sealed)
            rows.insert_records(tx, tenant, upload_id, sealed)
            changed = {"received": received, "records": received, "units": units}
            rows.update_store(tx, tenant, upload_id, **changed, size_bytes=row.size_bytes + size, updated=now())
            return received

        return self.db.write(write)

    def seal(self, tenant: str, upload_id: str, actor: str) -> DatasetInfo:
        """Turn a whole upload into a dataset, with its terms in the ledger. Again: the same dataset.

        Raises:
            InvalidRequestError: records are missing, or somebody registered the name meanwhile.
        """

        def write(tx: Transaction) -> str:
            row = _require_usable(rows.get_upload(tx, tenant, upload_id), upload_id)
            if row.status == rows.SEALED:
                return row.dataset_id
            if row.received != row.expected_records or row.units != row.slots:
                raise InvalidRequestError(
                    f"the upload has {row.received} of {row.expected_records} records and {row.units} of {row.slots} "
                    "privacy units; send the rest first",
                    field="upload_id",
                    constraint="every record received",
                )
            terms = terms_of(unit=row.unit, target_epsilon=row.target_epsilon, target_delta=row.target_delta)
            scope = DatasetScope(tenant=tenant, dataset_id=row.dataset_id)
            self.ledger.register(tx, scope, terms=terms, slots=row.slots, actor=actor)
            rows.update_store(tx, tenant, upload_id, status=rows.SEALED, created=now(), updated=now())
            return row.dataset_id

        return self._info(self.row(tenant, self.db.write(write)))

    # Datasets.

    @staticmethod
    def refuse_policy(caller: Caller) -> None:
        """A key with a policy changes no dataset, its own neither.

        Raises:
            AuthorizationError: it has one.
        """
        caller.refuse_policy("register or change datasets")

    def get(self, caller: Caller, dataset_id: str) -> DatasetInfo:
        """Describe a dataset that the caller may see."""
        self._require_visible(caller, dataset_id)
        return self._info(self.row(caller.tenant, dataset_id))

    def row(self, tenant: str, dataset_id: str) -> rows.StoreRow:
        """The row of a dataset whose records are there.

        Raises:
            ResourceNotFoundError: there is none for this tenant, or it was deleted.
        """
        row = self.find(tenant, dataset_id)
        if row is None or row.status != rows.SEALED:
            raise dataset_not_found(dataset_id)
        return row

    def find(self, tenant: str, dataset_id: str) -> rows.StoreRow | None:
        """The row of a dataset, also of a deleted one; ``None`` if the name was never registered."""
        return self.db.read(lambda tx: rows.find_dataset(tx, tenant, dataset_id))

    def listed(self, caller: Caller, limit: int) -> list[DatasetInfo]:
        """The datasets that the caller may see, newest first."""
        if caller.policy is not None:
            row = self.find(caller.tenant, caller.policy.dataset_id)
            return [] if row is None or row.status != rows.SEALED else [self._info(row)]
        return [self._info(r) for r in self.db.read(lambda tx: rows.list_datasets(tx, caller.tenant, limit=limit))]

    @staticmethod
    def _require_visible(caller: Caller, dataset_id: str) -> None:
        if caller.policy is not None and caller.policy.dataset_id != dataset_id:
            raise dataset_not_found(dataset_id)

    def record_ids(self, caller: Caller, dataset_id: str, position: int) -> tuple[list[bytes], int]:
        """Ids of the records from a position on, and where to go on (0: these were the last)."""
        self._require_visible(caller, dataset_id)
        tenant = caller.tenant
        row = self.row(tenant, dataset_id)
        found = self.db.read(lambda tx: rows.ids_from(tx, tenant, row.upload_id, position, LISTED_IDS))
        return [i for *_, i in found], found[-1][0] + 1 if len(found) == LISTED_IDS else 0

    def erase(self, tenant: str, dataset_id: str, record_ids: Sequence[bytes], actor: str) -> DatasetInfo:
        """Erase records for good and note how many; ids that are not there are passed over.

        When this returns, neither the database file nor its write-ahead log holds them.
        """

        def write(tx: Transaction) -> None:
            row = rows.find_dataset(tx, tenant, dataset_id)
            if row is None or row.status != rows.SEALED:
                raise dataset_not_found(dataset_id)
            gone = rows.delete_records(tx, tenant, row.upload_id, record_ids)
            if gone:
                records, units, _ = rows.count_records(tx, tenant, row.upload_id)
                rows.update_store(tx, tenant, row.upload_id, records=records, units=units, updated=now())
                scope = DatasetScope(tenant=tenant, dataset_id=dataset_id)
                self.ledger.note_erasure(tx, scope, records=gone, actor=actor)

        self.db.write(write)
        self.db.forget_deleted()
        return self._info(self.row(tenant, dataset_id))

    def delete(self, tenant: str, dataset_id: str, actor: str) -> None:
        """Erase every record. The ledger stays, what was spent stays, and the name is never free again.

        The key is destroyed in the transaction that says so; a crash before all rows are gone leaves ciphertext
        without a key, which the next start sweeps away.
        """

        def write(tx: Transaction) -> str:
            row = rows.find_dataset(tx, tenant, dataset_id)
            if row is None:
                raise dataset_not_found(dataset_id)
            if row.status == rows.SEALED:
                scope = DatasetScope(tenant=tenant, dataset_id=dataset_id)
                self.ledger.note_erasure(tx, scope, records=row.records, actor=actor, whole=True)
                gone = {"status": rows.DELETED, "wrapped_key": None, "records": 0, "units": 0, "size_bytes": 0}
                rows.update_store(tx, tenant, row.upload_id, **gone, updated=now())
            return row.upload_id

        self._purge(tenant, self.db.write(write))
        self.db.forget_deleted()

    def raise_target(
        self, tenant: str, dataset_id: str, target_epsilon: float, *, reason: str, actor: str, request_id: str
    ) -> Budget:
        """Raise the target of any dataset with a ledger; the raise, its reason and the key that asked are logged."""
        scope = DatasetScope(tenant=tenant, dataset_id=dataset_id)
        self.ledger.raise_target(
            scope, target_epsilon=target_epsilon, reason=reason, actor=actor, request_id=request_id
        )
        spent = self.ledger.spent(scope)
        return Budget(
            dataset_id=dataset_id,
            epsilon_spent=spent.epsilon,
            target_epsilon=INF if spent.target_epsilon is None else spent.target_epsilon,
            target_delta=spent.delta,
        )

    def sweep(self) -> None:
        """Delete uploads that nobody goes on with, and what a crash left of deleted datasets."""
        idle_since = now() - IDLE_UPLOAD
        for row in self.db.read(lambda tx: rows.leftovers(tx, idle_since=idle_since)):
            if self.db.write(partial(_give_up, row=row, idle_since=idle_since)):
                self._purge(row.tenant, row.upload_id)
                self.db.write(partial(rows.delete_upload, tenant=row.tenant, upload_id=row.upload_id))

    def _purge(self, tenant: str, upload_id: str) -> None:
        while self.db.write(lambda tx: rows.delete_some_records(tx, tenant, upload_id, PURGED_AT_ONCE)):
            pass

    def _require_unused(self, tx: Transaction, tenant: str, dataset_id: str) -> None:
        if ledger_rows.last_entry(tx, tenant, dataset_id) is not None:
            raise InvalidRequestError(
                f"dataset {dataset_id} has a ledger already, and a budget is set once; use "
                "service.get_dataset, or take another dataset_id",
                field="dataset_id",
                constraint="never used before",
            )

    def _info(self, row: rows.StoreRow) -> DatasetInfo:
        spent = self.ledger.spent(DatasetScope(tenant=row.tenant, dataset_id=row.dataset_id))
        return DatasetInfo(
            dataset_id=row.dataset_id,
            privacy_unit=row.unit,
            num_slots=row.slots,
            num_units=row.units,
            num_records=row.records,
            truncate=bool(row.truncate),
            target_epsilon=INF if spent.target_epsilon is None else spent.target_epsilon,
            target_delta=spent.delta,
            epsilon_spent=spent.epsilon,
            created=row.created,
        )


def _give_up(tx: Transaction, *, row: rows.StoreRow, idle_since: datetime) -> bool:
    """Make sure that nobody goes on with an upload whose records are about to go; says whether that is so."""
    current = rows.get_upload(tx, row.tenant, row.upload_id)
    if current is not None and current.status == rows.OPEN and current.updated < idle_since:
        rows.update_store(tx, row.tenant, row.upload_id, wrapped_key=None, received=0)
        return True
    return current is not None and current.status == rows.DELETED


def _units_after(row: rows.StoreRow, added: Sequence[rows.RecordRow]) -> int:
    """How many units there are with these records.

    Raises:
        InvalidRequestError: slots are not numbered in order of first appearance, or are not the records themselves
            where a record is the unit.
    """
    units = row.units
    for record in added:
        if record.slot == units:
            units += 1
        elif record.slot > units or row.unit == "datum":
            raise InvalidRequestError(
                "slots must be numbered from 0 in order of first appearance, one for each record where the record is "
                "the privacy unit",
                field="slot",
                constraint="in order of first appearance",
            )
    return units


def _require_same(found: rows.StoreRow, new: NewDataset) -> None:
    there = (found.dataset_id, found.unit, found.target_epsilon, found.target_delta, bool(found.truncate))
    target = None if new.target_epsilon == INF else new.target_epsilon
    asked = (new.dataset_id, new.privacy_unit, target, new.target_delta, new.truncate)
    if (*there, found.expected_records, found.slots) != (*asked, new.num_records, new.num_slots):
        raise InvalidRequestError(
            "this upload_id began another dataset", field="upload_id", constraint="one dataset per upload_id"
        )


def _require_usable(row: rows.StoreRow | None, upload_id: str) -> rows.StoreRow:
    if row is None or row.wrapped_key is None:  # never begun; or given up, or deleted since
        raise _no_upload(upload_id)
    return row


def _no_upload(upload_id: str) -> ResourceNotFoundError:
    return ResourceNotFoundError(
        "no such upload for this tenant; it may have expired", resource_type="upload", resource_id=upload_id
    )


def _wrong_place(received: int) -> InvalidRequestError:
    return InvalidRequestError(
        f"the upload has {received} records, and what was sent does not follow them or differs from what is there",
        field="position",
        constraint="records in order, once",
    )


def _too_large(what: str, limit: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"the dataset would have {what}, over the {limit}; register it in parts, or ask the operator to raise "
        "max_dataset_bytes or max_dataset_records",
        field="records",
        constraint=f"at most {limit}",
    )

"""Dataset: a handle on records that the server keeps, draws batches from, and erases for good."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator, Mapping, Sequence
from decimal import ROUND_FLOOR, Decimal
from typing import Any

from tg_tinker._transport import Transport
from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import DPConfig
from tg_tinker.types.records import RECORD_ID_BYTES, Budget, DatasetInfo, NewDataset, Record
from tg_tinker.wire import datasets as wire

CHUNK_BYTES = 2 * 2**20  # of one append; the server takes 4 MiB
CHUNK_RECORDS = 5_000
IDS_AT_ONCE = 100_000


class Dataset:
    """A registered dataset. Made by ``ServiceClient``; threads may share it.

    Attributes show the dataset as it was last heard of; ``refresh`` asks again.
    """

    def __init__(self, transport: Transport, info: DatasetInfo) -> None:
        self._transport = transport
        self._info = info

    @property
    def id(self) -> str:
        """Whose budget: every run naming it shares it."""
        return self._info.dataset_id

    @property
    def info(self) -> DatasetInfo:
        """Sizes, terms and what was spent, as last heard."""
        return self._info

    @property
    def privacy_unit(self) -> str:
        """What one epsilon protects."""
        return self._info.privacy_unit

    @property
    def num_slots(self) -> int:
        """Privacy units at registration: the sampling rate is expected batch / num_slots for ever."""
        return self._info.num_slots

    @property
    def num_units(self) -> int:
        """Privacy units that still have a record."""
        return self._info.num_units

    @property
    def num_records(self) -> int:
        """Records that were not erased."""
        return self._info.num_records

    @property
    def record_ids(self) -> list[str]:
        """Ids of the records that are there, in the order in which they were given. Asks the server."""
        found: list[str] = []
        position = 0
        while True:
            reply = self._transport.call(wire.list_record_ids(self.id, position))
            found += wire.record_ids_from_bytes(reply.record_ids)
            position = reply.next_position
            if not position:
                return found

    def refresh(self) -> DatasetInfo:
        """Ask the server how the dataset stands now."""
        self._info = get(self._transport, self.id)
        return self._info

    def erase(self, record_ids: Sequence[str]) -> int:
        """Erase records for good; returns how many records were erased. Ids that are gone already are passed over.

        When it returns they are in no file of the server's database. Their places stay empty: the sampling rate is
        as before. What was learned from them before stays in models that were released, and in the budget.
        """
        packed = wire.record_ids_to_bytes(record_ids)
        size = RECORD_ID_BYTES * IDS_AT_ONCE
        before = self.refresh().num_records
        for start in range(0, len(packed), size):
            request = wire.erase_records(self.id, packed[start : start + size])
            self._info = wire.dataset_from_proto(self._transport.call(request, attempt_s=self._patience_s))
        return before - self._info.num_records

    def dp_config(self, **overrides: Any) -> DPConfig:
        """A DPConfig with the dataset's terms, for runs whose batches the server draws.

        Args:
            overrides: other fields, e.g. ``noise_multiplier``. ``sampling="none"`` is for runs that send batches.
        """
        info = self._info
        terms = {
            "dataset_id": info.dataset_id,
            "dataset_size": info.num_slots,
            "sampling": "poisson",
            "privacy_unit": info.privacy_unit,
            "target_epsilon": info.target_epsilon if math.isfinite(info.target_epsilon) else None,
            "target_delta": info.target_delta,
        }
        return DPConfig(**{**terms, **overrides})

    def __repr__(self) -> str:
        return f"<Dataset {self.id}: {self.num_records} records of {self.num_units} units>"

    @property
    def _patience_s(self) -> float:
        return self._transport.config.timeout


def default_delta(units: int) -> float:
    """1 / (2 * units), rounded down to one digit: below the chance of publishing one unit's data.

    >>> default_delta(45_593)
    1e-05
    """
    exact = Decimal(1) / (2 * units)
    return float(exact.quantize(Decimal(1).scaleb(exact.adjusted()), rounding=ROUND_FLOOR))


def create(
    transport: Transport,
    dataset_id: str,
    records: Sequence[str | Mapping[str, Any]],
    *,
    unit_ids: Sequence[str] | None,
    privacy_unit: str,
    target_epsilon: float | None,
    target_delta: float | None,
    truncate: bool,
) -> Dataset:
    """Upload records and register them; see ``ServiceClient.create_dataset``."""
    if isinstance(records, str | Mapping):
        raise InvalidRequestError(
            "records is one text or one dict; give a list of records", field="records", constraint="a list"
        )
    encoded = [Record.of(r).to_bytes() for r in records]
    slots = _slots(len(encoded), unit_ids, privacy_unit)
    units = len(set(slots))
    if not units:
        raise InvalidRequestError("there are no records", field="records", constraint="at least one")
    new = NewDataset(
        upload_id=uuid.uuid4().hex,
        dataset_id=dataset_id,
        privacy_unit=privacy_unit,
        target_epsilon=math.inf if target_epsilon is None else target_epsilon,
        target_delta=default_delta(units) if target_delta is None else target_delta,
        truncate=truncate,
        num_records=len(encoded),
        num_slots=units,
    )
    patience_s = transport.config.timeout
    transport.call(wire.new_dataset_to_proto(new), attempt_s=patience_s)
    for start, chunk in _chunks(encoded):
        rows = list(zip(chunk, slots[start:], strict=False))
        transport.call(wire.append_records(new.upload_id, start, rows), attempt_s=patience_s)
    sealed = transport.call(wire.seal_dataset(new.upload_id), attempt_s=patience_s)
    return Dataset(transport, wire.dataset_from_proto(sealed))


def get(transport: Transport, dataset_id: str) -> DatasetInfo:
    """A dataset as it stands now."""
    return wire.dataset_from_proto(transport.call(wire.get_dataset(dataset_id)))


def listed(transport: Transport, limit: int) -> list[Dataset]:
    """The newest datasets of the tenant."""
    reply = transport.call(wire.list_datasets(limit))
    return [Dataset(transport, wire.dataset_from_proto(d)) for d in reply.datasets]


def delete(transport: Transport, dataset_id: str) -> None:
    """Erase every record of a dataset."""
    transport.call(wire.delete_dataset(dataset_id), attempt_s=transport.config.timeout)


def raise_budget(transport: Transport, dataset_id: str, target_epsilon: float, reason: str) -> Budget:
    """Raise a dataset's target."""
    request = wire.raise_budget(uuid.uuid4().hex, dataset_id, target_epsilon, reason)
    return wire.budget_from_proto(transport.call(request))


def _slots(records: int, unit_ids: Sequence[str] | None, privacy_unit: str) -> list[int]:
    """The slot of each record: units numbered in order of first appearance. Their names stay in this process."""
    if unit_ids is None:
        if privacy_unit != "datum":
            raise InvalidRequestError(
                f"privacy_unit={privacy_unit!r} needs unit_ids: say whose each record is",
                field="unit_ids",
                constraint="one per record",
            )
        return list(range(records))
    if privacy_unit == "datum":
        raise InvalidRequestError(
            "unit_ids say whose each record is, but privacy_unit='datum' protects single records; give "
            "privacy_unit='user' or what they stand for",
            field="privacy_unit",
            constraint="not 'datum' with unit_ids",
        )
    named = not isinstance(unit_ids, str) and all(isinstance(u, str) and u for u in unit_ids)
    if not named or len(unit_ids) != records:
        raise InvalidRequestError(
            f"unit_ids is a list of non-empty strings, one for each of the {records} records",
            field="unit_ids",
            constraint="one per record",
        )
    numbers: dict[str, int] = {}
    return [numbers.setdefault(unit, len(numbers)) for unit in unit_ids]


def _chunks(encoded: Sequence[bytes]) -> Iterator[tuple[int, list[bytes]]]:
    start, size = 0, 0
    for end, data in enumerate(encoded):
        if size and (size + len(data) > CHUNK_BYTES or end - start == CHUNK_RECORDS):
            yield start, list(encoded[start:end])
            start, size = end, 0
        size += len(data) + 16  # what the protocol adds
    yield start, list(encoded[start:])

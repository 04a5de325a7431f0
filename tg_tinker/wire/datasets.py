"""Registered datasets on the wire."""

from __future__ import annotations

from collections.abc import Sequence

from tg_tinker.errors import InvalidRequestError
from tg_tinker.proto.v1 import datasets_pb2
from tg_tinker.types.records import RECORD_ID_BYTES, Budget, DatasetInfo, NewDataset
from tg_tinker.wire.times import time_from_proto, time_to_proto

_PREFIX = "rec_"


def new_dataset_to_proto(new: NewDataset) -> datasets_pb2.CreateDatasetRequest:
    """What is asked for as a message."""
    return datasets_pb2.CreateDatasetRequest(
        upload_id=new.upload_id,
        dataset_id=new.dataset_id,
        privacy_unit=new.privacy_unit,
        target_epsilon=new.target_epsilon,
        target_delta=new.target_delta,
        truncate=new.truncate,
        num_records=new.num_records,
        num_slots=new.num_slots,
    )


def new_dataset_from_proto(message: datasets_pb2.CreateDatasetRequest) -> NewDataset:
    """What is asked for, from a message.

    Raises:
        InvalidRequestError: naming the field that cannot be.
    """
    return NewDataset(
        upload_id=message.upload_id,
        dataset_id=message.dataset_id,
        privacy_unit=message.privacy_unit,
        target_epsilon=message.target_epsilon,
        target_delta=message.target_delta,
        truncate=message.truncate,
        num_records=message.num_records,
        num_slots=message.num_slots,
    )


def dataset_to_proto(info: DatasetInfo) -> datasets_pb2.DatasetInfo:
    """A dataset's description as a message."""
    return datasets_pb2.DatasetInfo(
        dataset_id=info.dataset_id,
        privacy_unit=info.privacy_unit,
        num_slots=info.num_slots,
        num_units=info.num_units,
        num_records=info.num_records,
        truncate=info.truncate,
        target_epsilon=info.target_epsilon,
        target_delta=info.target_delta,
        epsilon_spent=info.epsilon_spent,
        created=time_to_proto(info.created),
    )


def dataset_from_proto(message: datasets_pb2.DatasetInfo) -> DatasetInfo:
    """A dataset's description from a message."""
    return DatasetInfo(
        dataset_id=message.dataset_id,
        privacy_unit=message.privacy_unit,
        num_slots=message.num_slots,
        num_units=message.num_units,
        num_records=message.num_records,
        truncate=message.truncate,
        target_epsilon=message.target_epsilon,
        target_delta=message.target_delta,
        epsilon_spent=message.epsilon_spent,
        created=time_from_proto(message.created),
    )


def budget_to_proto(budget: Budget) -> datasets_pb2.BudgetReply:
    """A budget as a message."""
    return datasets_pb2.BudgetReply(
        dataset_id=budget.dataset_id,
        epsilon_spent=budget.epsilon_spent,
        target_epsilon=budget.target_epsilon,
        target_delta=budget.target_delta,
    )


def budget_from_proto(message: datasets_pb2.BudgetReply) -> Budget:
    """A budget from a message."""
    return Budget(
        dataset_id=message.dataset_id,
        epsilon_spent=message.epsilon_spent,
        target_epsilon=message.target_epsilon,
        target_delta=message.target_delta,
    )


def record_ids_to_bytes(record_ids: Sequence[str]) -> bytes:
    """Ids as the protocol packs them.

    Raises:
        InvalidRequestError: one is not an id of a record.
    """
    if isinstance(record_ids, str) or not all(isinstance(i, str) for i in record_ids):
        raise _no_id()
    packed = []
    for record_id in record_ids:
        digits = record_id.removeprefix(_PREFIX)
        try:
            data = bytes.fromhex(digits)
        except ValueError as e:
            raise _no_id() from e
        if len(data) != RECORD_ID_BYTES or record_id != _PREFIX + data.hex():
            raise _no_id()
        packed.append(data)
    return b"".join(packed)


def record_ids_from_bytes(packed: bytes) -> list[str]:
    """Ids as people see them: ``rec_`` and 32 hexadecimal digits."""
    return [_PREFIX + i.hex() for i in split_record_ids(packed)]


def split_record_ids(packed: bytes) -> list[bytes]:
    """The ids in a packed field.

    Raises:
        InvalidRequestError: not a whole number of ids.
    """
    if len(packed) % RECORD_ID_BYTES:
        raise _no_id()
    return [packed[i : i + RECORD_ID_BYTES] for i in range(0, len(packed), RECORD_ID_BYTES)]


def _no_id() -> InvalidRequestError:
    return InvalidRequestError(
        "record_ids is a list of ids as dataset.record_ids gives them",
        field="record_ids",
        constraint="rec_ and 32 hexadecimal digits each",
    )


def append_records(
    upload_id: str, position: int, records: Sequence[tuple[bytes, int]]
) -> datasets_pb2.AppendRecordsRequest:
    """The next records of an upload, each with its slot."""
    messages = [datasets_pb2.DatasetRecord(data=data, slot=slot) for data, slot in records]
    return datasets_pb2.AppendRecordsRequest(upload_id=upload_id, position=position, records=messages)


def seal_dataset(upload_id: str) -> datasets_pb2.SealDatasetRequest:
    """Turn an upload into a dataset."""
    return datasets_pb2.SealDatasetRequest(upload_id=upload_id)


def get_dataset(dataset_id: str) -> datasets_pb2.GetDatasetRequest:
    """Describe a dataset."""
    return datasets_pb2.GetDatasetRequest(dataset_id=dataset_id)


def list_datasets(limit: int) -> datasets_pb2.ListDatasetsRequest:
    """The newest datasets."""
    return datasets_pb2.ListDatasetsRequest(limit=limit)


def list_record_ids(dataset_id: str, position: int) -> datasets_pb2.ListRecordIdsRequest:
    """A page of record ids."""
    return datasets_pb2.ListRecordIdsRequest(dataset_id=dataset_id, position=position)


def erase_records(dataset_id: str, packed_ids: bytes) -> datasets_pb2.EraseRecordsRequest:
    """Erase records."""
    return datasets_pb2.EraseRecordsRequest(dataset_id=dataset_id, record_ids=packed_ids)


def delete_dataset(dataset_id: str) -> datasets_pb2.DeleteDatasetRequest:
    """Erase every record of a dataset."""
    return datasets_pb2.DeleteDatasetRequest(dataset_id=dataset_id)


def raise_budget(
    request_id: str, dataset_id: str, target_epsilon: float, reason: str
) -> datasets_pb2.RaiseBudgetRequest:
    """Raise a target; the same ``request_id`` again is the same raise."""
    return datasets_pb2.RaiseBudgetRequest(
        request_id=request_id, dataset_id=dataset_id, target_epsilon=target_epsilon, reason=reason
    )

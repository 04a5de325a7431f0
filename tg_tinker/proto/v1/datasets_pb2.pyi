import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from tg_tinker.proto.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CreateDatasetRequest(_message.Message):
    __slots__ = ("upload_id", "dataset_id", "privacy_unit", "target_epsilon", "target_delta", "truncate", "num_records", "num_slots")
    UPLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    PRIVACY_UNIT_FIELD_NUMBER: _ClassVar[int]
    TARGET_EPSILON_FIELD_NUMBER: _ClassVar[int]
    TARGET_DELTA_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_FIELD_NUMBER: _ClassVar[int]
    NUM_RECORDS_FIELD_NUMBER: _ClassVar[int]
    NUM_SLOTS_FIELD_NUMBER: _ClassVar[int]
    upload_id: str
    dataset_id: str
    privacy_unit: str
    target_epsilon: float
    target_delta: float
    truncate: bool
    num_records: int
    num_slots: int
    def __init__(self, upload_id: _Optional[str] = ..., dataset_id: _Optional[str] = ..., privacy_unit: _Optional[str] = ..., target_epsilon: _Optional[float] = ..., target_delta: _Optional[float] = ..., truncate: _Optional[bool] = ..., num_records: _Optional[int] = ..., num_slots: _Optional[int] = ...) -> None: ...

class CreateDatasetReply(_message.Message):
    __slots__ = ("received",)
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    received: int
    def __init__(self, received: _Optional[int] = ...) -> None: ...

class DatasetRecord(_message.Message):
    __slots__ = ("data", "slot")
    DATA_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    slot: int
    def __init__(self, data: _Optional[bytes] = ..., slot: _Optional[int] = ...) -> None: ...

class AppendRecordsRequest(_message.Message):
    __slots__ = ("upload_id", "position", "records")
    UPLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    upload_id: str
    position: int
    records: _containers.RepeatedCompositeFieldContainer[DatasetRecord]
    def __init__(self, upload_id: _Optional[str] = ..., position: _Optional[int] = ..., records: _Optional[_Iterable[_Union[DatasetRecord, _Mapping]]] = ...) -> None: ...

class AppendRecordsReply(_message.Message):
    __slots__ = ("received",)
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    received: int
    def __init__(self, received: _Optional[int] = ...) -> None: ...

class SealDatasetRequest(_message.Message):
    __slots__ = ("upload_id",)
    UPLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    upload_id: str
    def __init__(self, upload_id: _Optional[str] = ...) -> None: ...

class DatasetInfo(_message.Message):
    __slots__ = ("dataset_id", "privacy_unit", "num_slots", "num_units", "num_records", "truncate", "target_epsilon", "target_delta", "epsilon_spent", "created")
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    PRIVACY_UNIT_FIELD_NUMBER: _ClassVar[int]
    NUM_SLOTS_FIELD_NUMBER: _ClassVar[int]
    NUM_UNITS_FIELD_NUMBER: _ClassVar[int]
    NUM_RECORDS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_FIELD_NUMBER: _ClassVar[int]
    TARGET_EPSILON_FIELD_NUMBER: _ClassVar[int]
    TARGET_DELTA_FIELD_NUMBER: _ClassVar[int]
    EPSILON_SPENT_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    dataset_id: str
    privacy_unit: str
    num_slots: int
    num_units: int
    num_records: int
    truncate: bool
    target_epsilon: float
    target_delta: float
    epsilon_spent: float
    created: _timestamp_pb2.Timestamp
    def __init__(self, dataset_id: _Optional[str] = ..., privacy_unit: _Optional[str] = ..., num_slots: _Optional[int] = ..., num_units: _Optional[int] = ..., num_records: _Optional[int] = ..., truncate: _Optional[bool] = ..., target_epsilon: _Optional[float] = ..., target_delta: _Optional[float] = ..., epsilon_spent: _Optional[float] = ..., created: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class GetDatasetRequest(_message.Message):
    __slots__ = ("dataset_id",)
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    dataset_id: str
    def __init__(self, dataset_id: _Optional[str] = ...) -> None: ...

class ListDatasetsRequest(_message.Message):
    __slots__ = ("limit",)
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    limit: int
    def __init__(self, limit: _Optional[int] = ...) -> None: ...

class ListDatasetsReply(_message.Message):
    __slots__ = ("datasets",)
    DATASETS_FIELD_NUMBER: _ClassVar[int]
    datasets: _containers.RepeatedCompositeFieldContainer[DatasetInfo]
    def __init__(self, datasets: _Optional[_Iterable[_Union[DatasetInfo, _Mapping]]] = ...) -> None: ...

class ListRecordIdsRequest(_message.Message):
    __slots__ = ("dataset_id", "position")
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    dataset_id: str
    position: int
    def __init__(self, dataset_id: _Optional[str] = ..., position: _Optional[int] = ...) -> None: ...

class ListRecordIdsReply(_message.Message):
    __slots__ = ("record_ids", "next_position")
    RECORD_IDS_FIELD_NUMBER: _ClassVar[int]
    NEXT_POSITION_FIELD_NUMBER: _ClassVar[int]
    record_ids: bytes
    next_position: int
    def __init__(self, record_ids: _Optional[bytes] = ..., next_position: _Optional[int] = ...) -> None: ...

class EraseRecordsRequest(_message.Message):
    __slots__ = ("dataset_id", "record_ids")
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    RECORD_IDS_FIELD_NUMBER: _ClassVar[int]
    dataset_id: str
    record_ids: bytes
    def __init__(self, dataset_id: _Optional[str] = ..., record_ids: _Optional[bytes] = ...) -> None: ...

class DeleteDatasetRequest(_message.Message):
    __slots__ = ("dataset_id",)
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    dataset_id: str
    def __init__(self, dataset_id: _Optional[str] = ...) -> None: ...

class DeleteDatasetReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RaiseBudgetRequest(_message.Message):
    __slots__ = ("request_id", "dataset_id", "target_epsilon", "reason")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    TARGET_EPSILON_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    dataset_id: str
    target_epsilon: float
    reason: str
    def __init__(self, request_id: _Optional[str] = ..., dataset_id: _Optional[str] = ..., target_epsilon: _Optional[float] = ..., reason: _Optional[str] = ...) -> None: ...

class BudgetReply(_message.Message):
    __slots__ = ("dataset_id", "epsilon_spent", "target_epsilon", "target_delta")
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    EPSILON_SPENT_FIELD_NUMBER: _ClassVar[int]
    TARGET_EPSILON_FIELD_NUMBER: _ClassVar[int]
    TARGET_DELTA_FIELD_NUMBER: _ClassVar[int]
    dataset_id: str
    epsilon_spent: float
    target_epsilon: float
    target_delta: float
    def __init__(self, dataset_id: _Optional[str] = ..., epsilon_spent: _Optional[float] = ..., target_epsilon: _Optional[float] = ..., target_delta: _Optional[float] = ...) -> None: ...

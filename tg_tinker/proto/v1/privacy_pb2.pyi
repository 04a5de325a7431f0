import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from tg_tinker.proto.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetLedgerRequest(_message.Message):
    __slots__ = ("dataset_id",)
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    dataset_id: str
    def __init__(self, dataset_id: _Optional[str] = ...) -> None: ...

class GetLedgerReply(_message.Message):
    __slots__ = ("dataset_id", "entries_json", "epsilon_spent", "target_epsilon", "delta")
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_JSON_FIELD_NUMBER: _ClassVar[int]
    EPSILON_SPENT_FIELD_NUMBER: _ClassVar[int]
    TARGET_EPSILON_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    dataset_id: str
    entries_json: _containers.RepeatedScalarFieldContainer[str]
    epsilon_spent: float
    target_epsilon: float
    delta: float
    def __init__(self, dataset_id: _Optional[str] = ..., entries_json: _Optional[_Iterable[str]] = ..., epsilon_spent: _Optional[float] = ..., target_epsilon: _Optional[float] = ..., delta: _Optional[float] = ...) -> None: ...

class GetPrivacyReportRequest(_message.Message):
    __slots__ = ("dataset_id",)
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    dataset_id: str
    def __init__(self, dataset_id: _Optional[str] = ...) -> None: ...

class GetPrivacyReportReply(_message.Message):
    __slots__ = ("report_json",)
    REPORT_JSON_FIELD_NUMBER: _ClassVar[int]
    report_json: str
    def __init__(self, report_json: _Optional[str] = ...) -> None: ...

class AttachAuditRequest(_message.Message):
    __slots__ = ("dataset_id", "result_json")
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    RESULT_JSON_FIELD_NUMBER: _ClassVar[int]
    dataset_id: str
    result_json: str
    def __init__(self, dataset_id: _Optional[str] = ..., result_json: _Optional[str] = ...) -> None: ...

class AttachAuditReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ForecastPrivacyRequest(_message.Message):
    __slots__ = ("run_id", "steps")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    steps: int
    def __init__(self, run_id: _Optional[str] = ..., steps: _Optional[int] = ...) -> None: ...

class ForecastPrivacyReply(_message.Message):
    __slots__ = ("epsilon_now", "epsilon_after", "steps_remaining", "delta", "ledger_head")
    EPSILON_NOW_FIELD_NUMBER: _ClassVar[int]
    EPSILON_AFTER_FIELD_NUMBER: _ClassVar[int]
    STEPS_REMAINING_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    LEDGER_HEAD_FIELD_NUMBER: _ClassVar[int]
    epsilon_now: float
    epsilon_after: float
    steps_remaining: int
    delta: float
    ledger_head: bytes
    def __init__(self, epsilon_now: _Optional[float] = ..., epsilon_after: _Optional[float] = ..., steps_remaining: _Optional[int] = ..., delta: _Optional[float] = ..., ledger_head: _Optional[bytes] = ...) -> None: ...

class GetAuditLogRequest(_message.Message):
    __slots__ = ("run_id", "operation", "start_time", "end_time", "limit")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    END_TIME_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    operation: str
    start_time: _timestamp_pb2.Timestamp
    end_time: _timestamp_pb2.Timestamp
    limit: int
    def __init__(self, run_id: _Optional[str] = ..., operation: _Optional[str] = ..., start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., end_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., limit: _Optional[int] = ...) -> None: ...

class GetAuditLogReply(_message.Message):
    __slots__ = ("entries_json",)
    ENTRIES_JSON_FIELD_NUMBER: _ClassVar[int]
    entries_json: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, entries_json: _Optional[_Iterable[str]] = ...) -> None: ...

class GetCheckpointRequest(_message.Message):
    __slots__ = ("known_sizes",)
    KNOWN_SIZES_FIELD_NUMBER: _ClassVar[int]
    known_sizes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, known_sizes: _Optional[_Iterable[int]] = ...) -> None: ...

class GetCheckpointReply(_message.Message):
    __slots__ = ("states",)
    STATES_FIELD_NUMBER: _ClassVar[int]
    states: _containers.RepeatedCompositeFieldContainer[_common_pb2.LogState]
    def __init__(self, states: _Optional[_Iterable[_Union[_common_pb2.LogState, _Mapping]]] = ...) -> None: ...

class GetLogEntriesRequest(_message.Message):
    __slots__ = ("start", "count")
    START_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    start: int
    count: int
    def __init__(self, start: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class GetLogEntriesReply(_message.Message):
    __slots__ = ("entries_json",)
    ENTRIES_JSON_FIELD_NUMBER: _ClassVar[int]
    entries_json: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, entries_json: _Optional[_Iterable[str]] = ...) -> None: ...

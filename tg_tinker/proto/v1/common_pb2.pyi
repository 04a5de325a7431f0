from google.protobuf import descriptor_pb2 as _descriptor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Scope(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SCOPE_UNSPECIFIED: _ClassVar[Scope]
    SCOPE_PUBLIC: _ClassVar[Scope]
    SCOPE_READ: _ClassVar[Scope]
    SCOPE_TRAIN: _ClassVar[Scope]
    SCOPE_SAMPLE: _ClassVar[Scope]
    SCOPE_EXPORT: _ClassVar[Scope]
    SCOPE_AUDIT: _ClassVar[Scope]
    SCOPE_BUDGET: _ClassVar[Scope]

class OperationStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OPERATION_STATUS_UNSPECIFIED: _ClassVar[OperationStatus]
    OPERATION_STATUS_PENDING: _ClassVar[OperationStatus]
    OPERATION_STATUS_RUNNING: _ClassVar[OperationStatus]
    OPERATION_STATUS_COMPLETED: _ClassVar[OperationStatus]
    OPERATION_STATUS_FAILED: _ClassVar[OperationStatus]
    OPERATION_STATUS_CANCELLED: _ClassVar[OperationStatus]
    OPERATION_STATUS_UNKNOWN: _ClassVar[OperationStatus]
SCOPE_UNSPECIFIED: Scope
SCOPE_PUBLIC: Scope
SCOPE_READ: Scope
SCOPE_TRAIN: Scope
SCOPE_SAMPLE: Scope
SCOPE_EXPORT: Scope
SCOPE_AUDIT: Scope
SCOPE_BUDGET: Scope
OPERATION_STATUS_UNSPECIFIED: OperationStatus
OPERATION_STATUS_PENDING: OperationStatus
OPERATION_STATUS_RUNNING: OperationStatus
OPERATION_STATUS_COMPLETED: OperationStatus
OPERATION_STATUS_FAILED: OperationStatus
OPERATION_STATUS_CANCELLED: OperationStatus
OPERATION_STATUS_UNKNOWN: OperationStatus
SCOPE_FIELD_NUMBER: _ClassVar[int]
scope: _descriptor.FieldDescriptor

class Tensor(_message.Message):
    __slots__ = ("dtype", "shape", "data")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class OperationKey(_message.Message):
    __slots__ = ("run_id", "seq", "handle")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    seq: int
    handle: str
    def __init__(self, run_id: _Optional[str] = ..., seq: _Optional[int] = ..., handle: _Optional[str] = ...) -> None: ...

class LogState(_message.Message):
    __slots__ = ("checkpoint", "verifier_key", "known_size", "consistency")
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    VERIFIER_KEY_FIELD_NUMBER: _ClassVar[int]
    KNOWN_SIZE_FIELD_NUMBER: _ClassVar[int]
    CONSISTENCY_FIELD_NUMBER: _ClassVar[int]
    checkpoint: str
    verifier_key: str
    known_size: int
    consistency: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, checkpoint: _Optional[str] = ..., verifier_key: _Optional[str] = ..., known_size: _Optional[int] = ..., consistency: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("entry_json", "leaf_index", "inclusion", "log")
    ENTRY_JSON_FIELD_NUMBER: _ClassVar[int]
    LEAF_INDEX_FIELD_NUMBER: _ClassVar[int]
    INCLUSION_FIELD_NUMBER: _ClassVar[int]
    LOG_FIELD_NUMBER: _ClassVar[int]
    entry_json: str
    leaf_index: int
    inclusion: _containers.RepeatedScalarFieldContainer[bytes]
    log: LogState
    def __init__(self, entry_json: _Optional[str] = ..., leaf_index: _Optional[int] = ..., inclusion: _Optional[_Iterable[bytes]] = ..., log: _Optional[_Union[LogState, _Mapping]] = ...) -> None: ...

import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from tg_tinker.proto.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PullArtifactRequest(_message.Message):
    __slots__ = ("artifact_id",)
    ARTIFACT_ID_FIELD_NUMBER: _ClassVar[int]
    artifact_id: str
    def __init__(self, artifact_id: _Optional[str] = ...) -> None: ...

class ArtifactChunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class ArtifactInfo(_message.Message):
    __slots__ = ("artifact_id", "run_id", "step", "size_bytes", "content_hash", "encryption_algorithm", "encryption_key_id", "timestamp", "name", "kind", "path", "expires", "optimizer", "metadata_json")
    ARTIFACT_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CONTENT_HASH_FIELD_NUMBER: _ClassVar[int]
    ENCRYPTION_ALGORITHM_FIELD_NUMBER: _ClassVar[int]
    ENCRYPTION_KEY_ID_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    METADATA_JSON_FIELD_NUMBER: _ClassVar[int]
    artifact_id: str
    run_id: str
    step: int
    size_bytes: int
    content_hash: str
    encryption_algorithm: str
    encryption_key_id: str
    timestamp: _timestamp_pb2.Timestamp
    name: str
    kind: str
    path: str
    expires: _timestamp_pb2.Timestamp
    optimizer: bool
    metadata_json: str
    def __init__(self, artifact_id: _Optional[str] = ..., run_id: _Optional[str] = ..., step: _Optional[int] = ..., size_bytes: _Optional[int] = ..., content_hash: _Optional[str] = ..., encryption_algorithm: _Optional[str] = ..., encryption_key_id: _Optional[str] = ..., timestamp: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., name: _Optional[str] = ..., kind: _Optional[str] = ..., path: _Optional[str] = ..., expires: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., optimizer: _Optional[bool] = ..., metadata_json: _Optional[str] = ...) -> None: ...

class ListArtifactsRequest(_message.Message):
    __slots__ = ("run_id", "limit", "offset", "kind")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    limit: int
    offset: int
    kind: str
    def __init__(self, run_id: _Optional[str] = ..., limit: _Optional[int] = ..., offset: _Optional[int] = ..., kind: _Optional[str] = ...) -> None: ...

class ListArtifactsReply(_message.Message):
    __slots__ = ("artifacts", "total")
    ARTIFACTS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    artifacts: _containers.RepeatedCompositeFieldContainer[ArtifactInfo]
    total: int
    def __init__(self, artifacts: _Optional[_Iterable[_Union[ArtifactInfo, _Mapping]]] = ..., total: _Optional[int] = ...) -> None: ...

class GetArtifactRequest(_message.Message):
    __slots__ = ("artifact_id",)
    ARTIFACT_ID_FIELD_NUMBER: _ClassVar[int]
    artifact_id: str
    def __init__(self, artifact_id: _Optional[str] = ...) -> None: ...

class SetArtifactTTLRequest(_message.Message):
    __slots__ = ("artifact_id", "ttl_seconds")
    ARTIFACT_ID_FIELD_NUMBER: _ClassVar[int]
    TTL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    artifact_id: str
    ttl_seconds: int
    def __init__(self, artifact_id: _Optional[str] = ..., ttl_seconds: _Optional[int] = ...) -> None: ...

class DeleteArtifactRequest(_message.Message):
    __slots__ = ("artifact_id",)
    ARTIFACT_ID_FIELD_NUMBER: _ClassVar[int]
    artifact_id: str
    def __init__(self, artifact_id: _Optional[str] = ...) -> None: ...

class DeleteArtifactReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ExportArtifactRequest(_message.Message):
    __slots__ = ("artifact_id", "recipients", "pq_recipients")
    ARTIFACT_ID_FIELD_NUMBER: _ClassVar[int]
    RECIPIENTS_FIELD_NUMBER: _ClassVar[int]
    PQ_RECIPIENTS_FIELD_NUMBER: _ClassVar[int]
    artifact_id: str
    recipients: _containers.RepeatedScalarFieldContainer[str]
    pq_recipients: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, artifact_id: _Optional[str] = ..., recipients: _Optional[_Iterable[str]] = ..., pq_recipients: _Optional[_Iterable[str]] = ...) -> None: ...

class ImportArtifactRequest(_message.Message):
    __slots__ = ("signer", "data")
    SIGNER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    signer: str
    data: bytes
    def __init__(self, signer: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class ImportArtifactReply(_message.Message):
    __slots__ = ("artifact", "manifest_json")
    ARTIFACT_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_JSON_FIELD_NUMBER: _ClassVar[int]
    artifact: ArtifactInfo
    manifest_json: str
    def __init__(self, artifact: _Optional[_Union[ArtifactInfo, _Mapping]] = ..., manifest_json: _Optional[str] = ...) -> None: ...

from tg_tinker.proto.v1 import artifacts_pb2 as _artifacts_pb2
from tg_tinker.proto.v1 import common_pb2 as _common_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PullWeightsRequest(_message.Message):
    __slots__ = ("run_id",)
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    def __init__(self, run_id: _Optional[str] = ...) -> None: ...

class WeightsChunk(_message.Message):
    __slots__ = ("head", "data")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    head: WeightsHead
    data: bytes
    def __init__(self, head: _Optional[_Union[WeightsHead, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class WeightsHead(_message.Message):
    __slots__ = ("step", "size_bytes")
    STEP_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    step: int
    size_bytes: int
    def __init__(self, step: _Optional[int] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class WeightsSource(_message.Message):
    __slots__ = ("kind", "job", "round", "epsilon", "delta", "unit")
    KIND_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    kind: str
    job: str
    round: int
    epsilon: float
    delta: float
    unit: str
    def __init__(self, kind: _Optional[str] = ..., job: _Optional[str] = ..., round: _Optional[int] = ..., epsilon: _Optional[float] = ..., delta: _Optional[float] = ..., unit: _Optional[str] = ...) -> None: ...

class ImportWeightsRequest(_message.Message):
    __slots__ = ("head", "data")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    head: ImportWeightsHead
    data: bytes
    def __init__(self, head: _Optional[_Union[ImportWeightsHead, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class ImportWeightsHead(_message.Message):
    __slots__ = ("base_model", "lora_config_json", "step", "size_bytes", "source")
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    LORA_CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    base_model: str
    lora_config_json: str
    step: int
    size_bytes: int
    source: WeightsSource
    def __init__(self, base_model: _Optional[str] = ..., lora_config_json: _Optional[str] = ..., step: _Optional[int] = ..., size_bytes: _Optional[int] = ..., source: _Optional[_Union[WeightsSource, _Mapping]] = ...) -> None: ...

class ImportWeightsReply(_message.Message):
    __slots__ = ("artifact",)
    ARTIFACT_FIELD_NUMBER: _ClassVar[int]
    artifact: _artifacts_pb2.ArtifactInfo
    def __init__(self, artifact: _Optional[_Union[_artifacts_pb2.ArtifactInfo, _Mapping]] = ...) -> None: ...

class NoteFederationRequest(_message.Message):
    __slots__ = ("event", "job", "round", "reason")
    EVENT_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    event: str
    job: str
    round: int
    reason: str
    def __init__(self, event: _Optional[str] = ..., job: _Optional[str] = ..., round: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class NoteFederationReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

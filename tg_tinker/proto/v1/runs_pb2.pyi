import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.rpc import status_pb2 as _status_pb2
from tg_tinker.proto.v1 import common_pb2 as _common_pb2
from tg_tinker.proto.v1 import sampling_pb2 as _sampling_pb2
from tg_tinker.proto.v1 import training_pb2 as _training_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CreateTrainingClientRequest(_message.Message):
    __slots__ = ("request_id", "config_json", "checkpoint_id", "optimizer", "like", "base_model", "metadata_json")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_ID_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    LIKE_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    METADATA_JSON_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    config_json: str
    checkpoint_id: str
    optimizer: bool
    like: str
    base_model: str
    metadata_json: str
    def __init__(self, request_id: _Optional[str] = ..., config_json: _Optional[str] = ..., checkpoint_id: _Optional[str] = ..., optimizer: _Optional[bool] = ..., like: _Optional[str] = ..., base_model: _Optional[str] = ..., metadata_json: _Optional[str] = ...) -> None: ...

class PrivacyState(_message.Message):
    __slots__ = ("dataset_id", "epsilon_spent", "target_epsilon", "delta", "noise_multiplier", "sample_rate", "expected_batch_size", "ledger_head")
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    EPSILON_SPENT_FIELD_NUMBER: _ClassVar[int]
    TARGET_EPSILON_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    NOISE_MULTIPLIER_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_RATE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    LEDGER_HEAD_FIELD_NUMBER: _ClassVar[int]
    dataset_id: str
    epsilon_spent: float
    target_epsilon: float
    delta: float
    noise_multiplier: float
    sample_rate: float
    expected_batch_size: float
    ledger_head: bytes
    def __init__(self, dataset_id: _Optional[str] = ..., epsilon_spent: _Optional[float] = ..., target_epsilon: _Optional[float] = ..., delta: _Optional[float] = ..., noise_multiplier: _Optional[float] = ..., sample_rate: _Optional[float] = ..., expected_batch_size: _Optional[float] = ..., ledger_head: _Optional[bytes] = ...) -> None: ...

class RunInfo(_message.Message):
    __slots__ = ("run_id", "config_json", "status", "step", "created", "next_seq", "server_epoch", "privacy", "trainable_parameters", "base_dtype", "model_ref", "unit_key", "family", "tokenizer_id", "request_id", "updated")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    NEXT_SEQ_FIELD_NUMBER: _ClassVar[int]
    SERVER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    PRIVACY_FIELD_NUMBER: _ClassVar[int]
    TRAINABLE_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    BASE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    MODEL_REF_FIELD_NUMBER: _ClassVar[int]
    UNIT_KEY_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    UPDATED_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    config_json: str
    status: str
    step: int
    created: _timestamp_pb2.Timestamp
    next_seq: int
    server_epoch: str
    privacy: PrivacyState
    trainable_parameters: int
    base_dtype: str
    model_ref: str
    unit_key: bytes
    family: str
    tokenizer_id: str
    request_id: str
    updated: _timestamp_pb2.Timestamp
    def __init__(self, run_id: _Optional[str] = ..., config_json: _Optional[str] = ..., status: _Optional[str] = ..., step: _Optional[int] = ..., created: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., next_seq: _Optional[int] = ..., server_epoch: _Optional[str] = ..., privacy: _Optional[_Union[PrivacyState, _Mapping]] = ..., trainable_parameters: _Optional[int] = ..., base_dtype: _Optional[str] = ..., model_ref: _Optional[str] = ..., unit_key: _Optional[bytes] = ..., family: _Optional[str] = ..., tokenizer_id: _Optional[str] = ..., request_id: _Optional[str] = ..., updated: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class GetTrainingClientRequest(_message.Message):
    __slots__ = ("run_id", "summary")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    summary: bool
    def __init__(self, run_id: _Optional[str] = ..., summary: _Optional[bool] = ...) -> None: ...

class ListTrainingClientsRequest(_message.Message):
    __slots__ = ("status", "limit", "offset")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    status: str
    limit: int
    offset: int
    def __init__(self, status: _Optional[str] = ..., limit: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class ListTrainingClientsReply(_message.Message):
    __slots__ = ("runs", "total")
    RUNS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    runs: _containers.RepeatedCompositeFieldContainer[RunInfo]
    total: int
    def __init__(self, runs: _Optional[_Iterable[_Union[RunInfo, _Mapping]]] = ..., total: _Optional[int] = ...) -> None: ...

class DeleteTrainingClientRequest(_message.Message):
    __slots__ = ("run_id",)
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    def __init__(self, run_id: _Optional[str] = ...) -> None: ...

class DeleteTrainingClientReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class UnloadModelRequest(_message.Message):
    __slots__ = ("run_id",)
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    def __init__(self, run_id: _Optional[str] = ...) -> None: ...

class ResumeTrainingClientRequest(_message.Message):
    __slots__ = ("run_id", "finished_seqs")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    FINISHED_SEQS_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    finished_seqs: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, run_id: _Optional[str] = ..., finished_seqs: _Optional[_Iterable[int]] = ...) -> None: ...

class GetFutureRequest(_message.Message):
    __slots__ = ("key", "wait_s")
    KEY_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    key: OneofKey
    wait_s: float
    def __init__(self, key: _Optional[_Union[OneofKey, _Mapping]] = ..., wait_s: _Optional[float] = ...) -> None: ...

class OneofKey(_message.Message):
    __slots__ = ("future_id", "operation")
    FUTURE_ID_FIELD_NUMBER: _ClassVar[int]
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    future_id: str
    operation: _common_pb2.OperationKey
    def __init__(self, future_id: _Optional[str] = ..., operation: _Optional[_Union[_common_pb2.OperationKey, _Mapping]] = ...) -> None: ...

class FutureReply(_message.Message):
    __slots__ = ("future_id", "status", "operation", "server_epoch", "expected_seq", "durable_seq", "key", "forward_backward", "optim_step", "sample", "save_state", "load_state", "error")
    FUTURE_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    SERVER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_SEQ_FIELD_NUMBER: _ClassVar[int]
    DURABLE_SEQ_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    FORWARD_BACKWARD_FIELD_NUMBER: _ClassVar[int]
    OPTIM_STEP_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    SAVE_STATE_FIELD_NUMBER: _ClassVar[int]
    LOAD_STATE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    future_id: str
    status: _common_pb2.OperationStatus
    operation: str
    server_epoch: str
    expected_seq: int
    durable_seq: int
    key: _common_pb2.OperationKey
    forward_backward: _training_pb2.ForwardBackwardReply
    optim_step: _training_pb2.OptimStepReply
    sample: _sampling_pb2.SampleReply
    save_state: _training_pb2.SaveStateReply
    load_state: _training_pb2.LoadStateReply
    error: _status_pb2.Status
    def __init__(self, future_id: _Optional[str] = ..., status: _Optional[_Union[_common_pb2.OperationStatus, str]] = ..., operation: _Optional[str] = ..., server_epoch: _Optional[str] = ..., expected_seq: _Optional[int] = ..., durable_seq: _Optional[int] = ..., key: _Optional[_Union[_common_pb2.OperationKey, _Mapping]] = ..., forward_backward: _Optional[_Union[_training_pb2.ForwardBackwardReply, _Mapping]] = ..., optim_step: _Optional[_Union[_training_pb2.OptimStepReply, _Mapping]] = ..., sample: _Optional[_Union[_sampling_pb2.SampleReply, _Mapping]] = ..., save_state: _Optional[_Union[_training_pb2.SaveStateReply, _Mapping]] = ..., load_state: _Optional[_Union[_training_pb2.LoadStateReply, _Mapping]] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ...) -> None: ...

class CancelFutureRequest(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: OneofKey
    def __init__(self, key: _Optional[_Union[OneofKey, _Mapping]] = ...) -> None: ...

class CancelFutureReply(_message.Message):
    __slots__ = ("cancelled",)
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    cancelled: bool
    def __init__(self, cancelled: _Optional[bool] = ...) -> None: ...

class GetCapabilitiesRequest(_message.Message):
    __slots__ = ("client_version",)
    CLIENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    client_version: str
    def __init__(self, client_version: _Optional[str] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("name", "family", "parameters", "max_sequence_length")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    name: str
    family: str
    parameters: int
    max_sequence_length: int
    def __init__(self, name: _Optional[str] = ..., family: _Optional[str] = ..., parameters: _Optional[int] = ..., max_sequence_length: _Optional[int] = ...) -> None: ...

class Capabilities(_message.Message):
    __slots__ = ("server_version", "api_version", "models", "max_batch_records", "max_request_bytes", "losses", "optimizers", "lr_schedulers", "reducers", "dp_sampling_modes", "dp_accountants", "tenant_id", "api")
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    API_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_RECORDS_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZERS_FIELD_NUMBER: _ClassVar[int]
    LR_SCHEDULERS_FIELD_NUMBER: _ClassVar[int]
    REDUCERS_FIELD_NUMBER: _ClassVar[int]
    DP_SAMPLING_MODES_FIELD_NUMBER: _ClassVar[int]
    DP_ACCOUNTANTS_FIELD_NUMBER: _ClassVar[int]
    TENANT_ID_FIELD_NUMBER: _ClassVar[int]
    API_FIELD_NUMBER: _ClassVar[int]
    server_version: str
    api_version: str
    models: _containers.RepeatedCompositeFieldContainer[ModelInfo]
    max_batch_records: int
    max_request_bytes: int
    losses: _containers.RepeatedScalarFieldContainer[str]
    optimizers: _containers.RepeatedScalarFieldContainer[str]
    lr_schedulers: _containers.RepeatedScalarFieldContainer[str]
    reducers: _containers.RepeatedScalarFieldContainer[str]
    dp_sampling_modes: _containers.RepeatedScalarFieldContainer[str]
    dp_accountants: _containers.RepeatedScalarFieldContainer[str]
    tenant_id: str
    api: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, server_version: _Optional[str] = ..., api_version: _Optional[str] = ..., models: _Optional[_Iterable[_Union[ModelInfo, _Mapping]]] = ..., max_batch_records: _Optional[int] = ..., max_request_bytes: _Optional[int] = ..., losses: _Optional[_Iterable[str]] = ..., optimizers: _Optional[_Iterable[str]] = ..., lr_schedulers: _Optional[_Iterable[str]] = ..., reducers: _Optional[_Iterable[str]] = ..., dp_sampling_modes: _Optional[_Iterable[str]] = ..., dp_accountants: _Optional[_Iterable[str]] = ..., tenant_id: _Optional[str] = ..., api: _Optional[_Iterable[str]] = ...) -> None: ...

class GetTokenizerRequest(_message.Message):
    __slots__ = ("base_model",)
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    base_model: str
    def __init__(self, base_model: _Optional[str] = ...) -> None: ...

class TokenizerFile(_message.Message):
    __slots__ = ("name", "data")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    data: bytes
    def __init__(self, name: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

import datetime

from tg_tinker.proto.v1 import common_pb2 as _common_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PassMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PASS_MODE_UNSPECIFIED: _ClassVar[PassMode]
    PASS_MODE_TRAIN: _ClassVar[PassMode]
    PASS_MODE_EVAL: _ClassVar[PassMode]
PASS_MODE_UNSPECIFIED: PassMode
PASS_MODE_TRAIN: PassMode
PASS_MODE_EVAL: PassMode

class Submitted(_message.Message):
    __slots__ = ("future_id", "server_epoch", "expected_seq", "durable_seq")
    FUTURE_ID_FIELD_NUMBER: _ClassVar[int]
    SERVER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_SEQ_FIELD_NUMBER: _ClassVar[int]
    DURABLE_SEQ_FIELD_NUMBER: _ClassVar[int]
    future_id: str
    server_epoch: str
    expected_seq: int
    durable_seq: int
    def __init__(self, future_id: _Optional[str] = ..., server_epoch: _Optional[str] = ..., expected_seq: _Optional[int] = ..., durable_seq: _Optional[int] = ...) -> None: ...

class LossTensor(_message.Message):
    __slots__ = ("name", "dtype", "shape", "data", "crow_indices", "col_indices")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CROW_INDICES_FIELD_NUMBER: _ClassVar[int]
    COL_INDICES_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    crow_indices: bytes
    col_indices: bytes
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ..., crow_indices: _Optional[bytes] = ..., col_indices: _Optional[bytes] = ...) -> None: ...

class Datum(_message.Message):
    __slots__ = ("tokens", "chunk_lengths", "inputs")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    tokens: bytes
    chunk_lengths: bytes
    inputs: _containers.RepeatedCompositeFieldContainer[LossTensor]
    def __init__(self, tokens: _Optional[bytes] = ..., chunk_lengths: _Optional[bytes] = ..., inputs: _Optional[_Iterable[_Union[LossTensor, _Mapping]]] = ...) -> None: ...

class ForwardBackwardRequest(_message.Message):
    __slots__ = ("key", "mode", "input_ids", "attention_mask", "labels", "privacy_unit_ids", "batch_hash", "dataset_id", "datums", "loss_fn", "loss_fn_config", "loss_id", "coupling")
    class LossFnConfigEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    KEY_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    INPUT_IDS_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_MASK_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    PRIVACY_UNIT_IDS_FIELD_NUMBER: _ClassVar[int]
    BATCH_HASH_FIELD_NUMBER: _ClassVar[int]
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    DATUMS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FN_FIELD_NUMBER: _ClassVar[int]
    LOSS_FN_CONFIG_FIELD_NUMBER: _ClassVar[int]
    LOSS_ID_FIELD_NUMBER: _ClassVar[int]
    COUPLING_FIELD_NUMBER: _ClassVar[int]
    key: _common_pb2.OperationKey
    mode: PassMode
    input_ids: _common_pb2.Tensor
    attention_mask: _common_pb2.Tensor
    labels: _common_pb2.Tensor
    privacy_unit_ids: _containers.RepeatedScalarFieldContainer[str]
    batch_hash: str
    dataset_id: str
    datums: _containers.RepeatedScalarFieldContainer[bytes]
    loss_fn: str
    loss_fn_config: _containers.ScalarMap[str, float]
    loss_id: str
    coupling: str
    def __init__(self, key: _Optional[_Union[_common_pb2.OperationKey, _Mapping]] = ..., mode: _Optional[_Union[PassMode, str]] = ..., input_ids: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., attention_mask: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., labels: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., privacy_unit_ids: _Optional[_Iterable[str]] = ..., batch_hash: _Optional[str] = ..., dataset_id: _Optional[str] = ..., datums: _Optional[_Iterable[bytes]] = ..., loss_fn: _Optional[str] = ..., loss_fn_config: _Optional[_Mapping[str, float]] = ..., loss_id: _Optional[str] = ..., coupling: _Optional[str] = ...) -> None: ...

class AddUpdatesRequest(_message.Message):
    __slots__ = ("key", "vectors", "privacy_unit_ids")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    PRIVACY_UNIT_IDS_FIELD_NUMBER: _ClassVar[int]
    key: _common_pb2.OperationKey
    vectors: _common_pb2.Tensor
    privacy_unit_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, key: _Optional[_Union[_common_pb2.OperationKey, _Mapping]] = ..., vectors: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., privacy_unit_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class ForwardBackwardReply(_message.Message):
    __slots__ = ("loss", "batch_hash", "gradient_hash", "num_tokens", "latency_ms", "metrics", "loss_fn_output_type", "loss_fn_outputs")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    LOSS_FIELD_NUMBER: _ClassVar[int]
    BATCH_HASH_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_HASH_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LATENCY_MS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FN_OUTPUT_TYPE_FIELD_NUMBER: _ClassVar[int]
    LOSS_FN_OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    loss: float
    batch_hash: str
    gradient_hash: str
    num_tokens: int
    latency_ms: float
    metrics: _containers.ScalarMap[str, float]
    loss_fn_output_type: str
    loss_fn_outputs: _containers.RepeatedCompositeFieldContainer[LossOutputs]
    def __init__(self, loss: _Optional[float] = ..., batch_hash: _Optional[str] = ..., gradient_hash: _Optional[str] = ..., num_tokens: _Optional[int] = ..., latency_ms: _Optional[float] = ..., metrics: _Optional[_Mapping[str, float]] = ..., loss_fn_output_type: _Optional[str] = ..., loss_fn_outputs: _Optional[_Iterable[_Union[LossOutputs, _Mapping]]] = ...) -> None: ...

class LossOutputs(_message.Message):
    __slots__ = ("outputs",)
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedCompositeFieldContainer[LossTensor]
    def __init__(self, outputs: _Optional[_Iterable[_Union[LossTensor, _Mapping]]] = ...) -> None: ...

class AdamParams(_message.Message):
    __slots__ = ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm")
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    BETA1_FIELD_NUMBER: _ClassVar[int]
    BETA2_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    GRAD_CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    grad_clip_norm: float
    def __init__(self, learning_rate: _Optional[float] = ..., beta1: _Optional[float] = ..., beta2: _Optional[float] = ..., eps: _Optional[float] = ..., weight_decay: _Optional[float] = ..., grad_clip_norm: _Optional[float] = ...) -> None: ...

class OptimStepRequest(_message.Message):
    __slots__ = ("key", "apply_dp_noise", "known_log_size", "incomplete", "adam")
    KEY_FIELD_NUMBER: _ClassVar[int]
    APPLY_DP_NOISE_FIELD_NUMBER: _ClassVar[int]
    KNOWN_LOG_SIZE_FIELD_NUMBER: _ClassVar[int]
    INCOMPLETE_FIELD_NUMBER: _ClassVar[int]
    ADAM_FIELD_NUMBER: _ClassVar[int]
    key: _common_pb2.OperationKey
    apply_dp_noise: bool
    known_log_size: int
    incomplete: str
    adam: AdamParams
    def __init__(self, key: _Optional[_Union[_common_pb2.OperationKey, _Mapping]] = ..., apply_dp_noise: _Optional[bool] = ..., known_log_size: _Optional[int] = ..., incomplete: _Optional[str] = ..., adam: _Optional[_Union[AdamParams, _Mapping]] = ...) -> None: ...

class DPMetrics(_message.Message):
    __slots__ = ("noise_applied", "epsilon_spent", "total_epsilon", "delta", "grad_norm_before_clip", "grad_norm_after_clip", "num_clipped")
    NOISE_APPLIED_FIELD_NUMBER: _ClassVar[int]
    EPSILON_SPENT_FIELD_NUMBER: _ClassVar[int]
    TOTAL_EPSILON_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    GRAD_NORM_BEFORE_CLIP_FIELD_NUMBER: _ClassVar[int]
    GRAD_NORM_AFTER_CLIP_FIELD_NUMBER: _ClassVar[int]
    NUM_CLIPPED_FIELD_NUMBER: _ClassVar[int]
    noise_applied: bool
    epsilon_spent: float
    total_epsilon: float
    delta: float
    grad_norm_before_clip: float
    grad_norm_after_clip: float
    num_clipped: int
    def __init__(self, noise_applied: _Optional[bool] = ..., epsilon_spent: _Optional[float] = ..., total_epsilon: _Optional[float] = ..., delta: _Optional[float] = ..., grad_norm_before_clip: _Optional[float] = ..., grad_norm_after_clip: _Optional[float] = ..., num_clipped: _Optional[int] = ...) -> None: ...

class OptimStepReply(_message.Message):
    __slots__ = ("grad_norm", "learning_rate", "step", "dp_metrics", "latency_ms", "metrics", "ledger_head", "receipt")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    DP_METRICS_FIELD_NUMBER: _ClassVar[int]
    LATENCY_MS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    LEDGER_HEAD_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    grad_norm: float
    learning_rate: float
    step: int
    dp_metrics: DPMetrics
    latency_ms: float
    metrics: _containers.ScalarMap[str, float]
    ledger_head: bytes
    receipt: _common_pb2.Receipt
    def __init__(self, grad_norm: _Optional[float] = ..., learning_rate: _Optional[float] = ..., step: _Optional[int] = ..., dp_metrics: _Optional[_Union[DPMetrics, _Mapping]] = ..., latency_ms: _Optional[float] = ..., metrics: _Optional[_Mapping[str, float]] = ..., ledger_head: _Optional[bytes] = ..., receipt: _Optional[_Union[_common_pb2.Receipt, _Mapping]] = ...) -> None: ...

class SaveStateRequest(_message.Message):
    __slots__ = ("key", "include_optimizer", "metadata_json", "name", "kind", "ttl_seconds", "overwrite")
    KEY_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    METADATA_JSON_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TTL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    OVERWRITE_FIELD_NUMBER: _ClassVar[int]
    key: _common_pb2.OperationKey
    include_optimizer: bool
    metadata_json: str
    name: str
    kind: str
    ttl_seconds: int
    overwrite: bool
    def __init__(self, key: _Optional[_Union[_common_pb2.OperationKey, _Mapping]] = ..., include_optimizer: _Optional[bool] = ..., metadata_json: _Optional[str] = ..., name: _Optional[str] = ..., kind: _Optional[str] = ..., ttl_seconds: _Optional[int] = ..., overwrite: _Optional[bool] = ...) -> None: ...

class SaveStateReply(_message.Message):
    __slots__ = ("artifact_id", "size_bytes", "encryption_algorithm", "encryption_key_id", "metadata_json", "timestamp", "content_hash", "path")
    ARTIFACT_ID_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ENCRYPTION_ALGORITHM_FIELD_NUMBER: _ClassVar[int]
    ENCRYPTION_KEY_ID_FIELD_NUMBER: _ClassVar[int]
    METADATA_JSON_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_FIELD_NUMBER: _ClassVar[int]
    CONTENT_HASH_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    artifact_id: str
    size_bytes: int
    encryption_algorithm: str
    encryption_key_id: str
    metadata_json: str
    timestamp: _timestamp_pb2.Timestamp
    content_hash: str
    path: str
    def __init__(self, artifact_id: _Optional[str] = ..., size_bytes: _Optional[int] = ..., encryption_algorithm: _Optional[str] = ..., encryption_key_id: _Optional[str] = ..., metadata_json: _Optional[str] = ..., timestamp: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., content_hash: _Optional[str] = ..., path: _Optional[str] = ...) -> None: ...

class LoadStateRequest(_message.Message):
    __slots__ = ("key", "artifact_id", "optimizer")
    KEY_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_ID_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    key: _common_pb2.OperationKey
    artifact_id: str
    optimizer: bool
    def __init__(self, key: _Optional[_Union[_common_pb2.OperationKey, _Mapping]] = ..., artifact_id: _Optional[str] = ..., optimizer: _Optional[bool] = ...) -> None: ...

class LoadStateReply(_message.Message):
    __slots__ = ("artifact_id", "step", "metadata_json", "timestamp")
    ARTIFACT_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    METADATA_JSON_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_FIELD_NUMBER: _ClassVar[int]
    artifact_id: str
    step: int
    metadata_json: str
    timestamp: _timestamp_pb2.Timestamp
    def __init__(self, artifact_id: _Optional[str] = ..., step: _Optional[int] = ..., metadata_json: _Optional[str] = ..., timestamp: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class CreateCustomLossRequest(_message.Message):
    __slots__ = ("graph_json",)
    GRAPH_JSON_FIELD_NUMBER: _ClassVar[int]
    graph_json: str
    def __init__(self, graph_json: _Optional[str] = ...) -> None: ...

class CreateCustomLossReply(_message.Message):
    __slots__ = ("loss_id",)
    LOSS_ID_FIELD_NUMBER: _ClassVar[int]
    loss_id: str
    def __init__(self, loss_id: _Optional[str] = ...) -> None: ...

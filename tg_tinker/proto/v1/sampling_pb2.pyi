from tg_tinker.proto.v1 import common_pb2 as _common_pb2
from tg_tinker.proto.v1 import training_pb2 as _training_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SamplingParams(_message.Message):
    __slots__ = ("max_tokens", "temperature", "top_p", "top_k", "stop_sequences", "num_completions", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    STOP_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPLETIONS_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    stop_sequences: _containers.RepeatedScalarFieldContainer[str]
    num_completions: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., stop_sequences: _Optional[_Iterable[str]] = ..., num_completions: _Optional[int] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., seed: _Optional[int] = ...) -> None: ...

class SampleRequest(_message.Message):
    __slots__ = ("key", "prompts", "params")
    KEY_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    key: _common_pb2.OperationKey
    prompts: _containers.RepeatedScalarFieldContainer[str]
    params: SamplingParams
    def __init__(self, key: _Optional[_Union[_common_pb2.OperationKey, _Mapping]] = ..., prompts: _Optional[_Iterable[str]] = ..., params: _Optional[_Union[SamplingParams, _Mapping]] = ...) -> None: ...

class SampleText(_message.Message):
    __slots__ = ("prompt", "completion", "num_tokens", "finish_reason", "latency_ms")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    LATENCY_MS_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    completion: str
    num_tokens: int
    finish_reason: str
    latency_ms: float
    def __init__(self, prompt: _Optional[str] = ..., completion: _Optional[str] = ..., num_tokens: _Optional[int] = ..., finish_reason: _Optional[str] = ..., latency_ms: _Optional[float] = ...) -> None: ...

class SampleReply(_message.Message):
    __slots__ = ("samples", "total_tokens", "latency_ms")
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LATENCY_MS_FIELD_NUMBER: _ClassVar[int]
    samples: _containers.RepeatedCompositeFieldContainer[SampleText]
    total_tokens: int
    latency_ms: float
    def __init__(self, samples: _Optional[_Iterable[_Union[SampleText, _Mapping]]] = ..., total_tokens: _Optional[int] = ..., latency_ms: _Optional[float] = ...) -> None: ...

class SampleStreamRequest(_message.Message):
    __slots__ = ("run_id", "prompt", "params")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    prompt: str
    params: SamplingParams
    def __init__(self, run_id: _Optional[str] = ..., prompt: _Optional[str] = ..., params: _Optional[_Union[SamplingParams, _Mapping]] = ...) -> None: ...

class SampleChunk(_message.Message):
    __slots__ = ("text", "index", "token_ids", "finish_reason")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    text: str
    index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    finish_reason: str
    def __init__(self, text: _Optional[str] = ..., index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., finish_reason: _Optional[str] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class EncodeRequest(_message.Message):
    __slots__ = ("run_id", "texts", "sampler_id")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLER_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    texts: _containers.RepeatedScalarFieldContainer[str]
    sampler_id: str
    def __init__(self, run_id: _Optional[str] = ..., texts: _Optional[_Iterable[str]] = ..., sampler_id: _Optional[str] = ...) -> None: ...

class EncodeReply(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedCompositeFieldContainer[TokenIds]
    def __init__(self, ids: _Optional[_Iterable[_Union[TokenIds, _Mapping]]] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("run_id", "ids", "sampler_id")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLER_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    ids: _containers.RepeatedCompositeFieldContainer[TokenIds]
    sampler_id: str
    def __init__(self, run_id: _Optional[str] = ..., ids: _Optional[_Iterable[_Union[TokenIds, _Mapping]]] = ..., sampler_id: _Optional[str] = ...) -> None: ...

class DecodeReply(_message.Message):
    __slots__ = ("texts",)
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    texts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, texts: _Optional[_Iterable[str]] = ...) -> None: ...

class CreateSamplerRequest(_message.Message):
    __slots__ = ("sampler_id", "base_model", "path")
    SAMPLER_ID_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    sampler_id: str
    base_model: str
    path: str
    def __init__(self, sampler_id: _Optional[str] = ..., base_model: _Optional[str] = ..., path: _Optional[str] = ...) -> None: ...

class GetSamplerRequest(_message.Message):
    __slots__ = ("sampler_id",)
    SAMPLER_ID_FIELD_NUMBER: _ClassVar[int]
    sampler_id: str
    def __init__(self, sampler_id: _Optional[str] = ...) -> None: ...

class DeleteSamplerRequest(_message.Message):
    __slots__ = ("sampler_id",)
    SAMPLER_ID_FIELD_NUMBER: _ClassVar[int]
    sampler_id: str
    def __init__(self, sampler_id: _Optional[str] = ...) -> None: ...

class DeleteSamplerReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Sampler(_message.Message):
    __slots__ = ("sampler_id", "base_model", "path")
    SAMPLER_ID_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    sampler_id: str
    base_model: str
    path: str
    def __init__(self, sampler_id: _Optional[str] = ..., base_model: _Optional[str] = ..., path: _Optional[str] = ...) -> None: ...

class StopTexts(_message.Message):
    __slots__ = ("texts",)
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    texts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, texts: _Optional[_Iterable[str]] = ...) -> None: ...

class StopTokens(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class TokenSamplingParams(_message.Message):
    __slots__ = ("max_tokens", "small_seed", "large_seed", "stop_text", "stop_texts", "stop_tokens", "temperature", "top_k", "top_p")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SMALL_SEED_FIELD_NUMBER: _ClassVar[int]
    LARGE_SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_TEXT_FIELD_NUMBER: _ClassVar[int]
    STOP_TEXTS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    small_seed: int
    large_seed: int
    stop_text: str
    stop_texts: StopTexts
    stop_tokens: StopTokens
    temperature: float
    top_k: int
    top_p: float
    def __init__(self, max_tokens: _Optional[int] = ..., small_seed: _Optional[int] = ..., large_seed: _Optional[int] = ..., stop_text: _Optional[str] = ..., stop_texts: _Optional[_Union[StopTexts, _Mapping]] = ..., stop_tokens: _Optional[_Union[StopTokens, _Mapping]] = ..., temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ...) -> None: ...

class SampleTokensRequest(_message.Message):
    __slots__ = ("sampler_id", "prompt", "num_samples", "params", "prompt_logprobs", "topk_prompt_logprobs", "topk_sample_logprobs", "target_prompt_logprobs", "prompt_alt_tokens_k", "prompt_logprobs_last_n")
    SAMPLER_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    NUM_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOPK_PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOPK_SAMPLE_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TARGET_PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_ALT_TOKENS_K_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_LAST_N_FIELD_NUMBER: _ClassVar[int]
    sampler_id: str
    prompt: bytes
    num_samples: int
    params: TokenSamplingParams
    prompt_logprobs: bool
    topk_prompt_logprobs: int
    topk_sample_logprobs: int
    target_prompt_logprobs: _common_pb2.Tensor
    prompt_alt_tokens_k: int
    prompt_logprobs_last_n: int
    def __init__(self, sampler_id: _Optional[str] = ..., prompt: _Optional[bytes] = ..., num_samples: _Optional[int] = ..., params: _Optional[_Union[TokenSamplingParams, _Mapping]] = ..., prompt_logprobs: _Optional[bool] = ..., topk_prompt_logprobs: _Optional[int] = ..., topk_sample_logprobs: _Optional[int] = ..., target_prompt_logprobs: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., prompt_alt_tokens_k: _Optional[int] = ..., prompt_logprobs_last_n: _Optional[int] = ...) -> None: ...

class TopkTokens(_message.Message):
    __slots__ = ("token_ids", "logprobs")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _common_pb2.Tensor
    logprobs: _common_pb2.Tensor
    def __init__(self, token_ids: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., logprobs: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ...) -> None: ...

class SampledTokens(_message.Message):
    __slots__ = ("index", "tokens", "logprobs", "topk_logprobs", "stop_reason")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOPK_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    STOP_REASON_FIELD_NUMBER: _ClassVar[int]
    index: int
    tokens: bytes
    logprobs: bytes
    topk_logprobs: TopkTokens
    stop_reason: str
    def __init__(self, index: _Optional[int] = ..., tokens: _Optional[bytes] = ..., logprobs: _Optional[bytes] = ..., topk_logprobs: _Optional[_Union[TopkTokens, _Mapping]] = ..., stop_reason: _Optional[str] = ...) -> None: ...

class PromptFigures(_message.Message):
    __slots__ = ("has_logprobs", "logprobs", "topk_logprobs", "target_logprobs", "alt_tokens", "cache_hit_tokens")
    HAS_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOPK_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TARGET_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ALT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHE_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    has_logprobs: bool
    logprobs: bytes
    topk_logprobs: TopkTokens
    target_logprobs: _common_pb2.Tensor
    alt_tokens: TopkTokens
    cache_hit_tokens: int
    def __init__(self, has_logprobs: _Optional[bool] = ..., logprobs: _Optional[bytes] = ..., topk_logprobs: _Optional[_Union[TopkTokens, _Mapping]] = ..., target_logprobs: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., alt_tokens: _Optional[_Union[TopkTokens, _Mapping]] = ..., cache_hit_tokens: _Optional[int] = ...) -> None: ...

class SampleTokensReply(_message.Message):
    __slots__ = ("sequences", "prompt")
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    sequences: _containers.RepeatedCompositeFieldContainer[SampledTokens]
    prompt: PromptFigures
    def __init__(self, sequences: _Optional[_Iterable[_Union[SampledTokens, _Mapping]]] = ..., prompt: _Optional[_Union[PromptFigures, _Mapping]] = ...) -> None: ...

"""Requests of the protocol that come as JSON. Unknown fields are ignored: every new client sends some."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tg_tinker.errors import InvalidRequestError

MANY = 2**53
_Number = Annotated[int, Field(ge=0, lt=MANY)]
_Position = Annotated[int, Field(ge=1, lt=MANY)]
_Id = Annotated[str, Field(max_length=128)]
_Text = Annotated[str, Field(max_length=1000)]
_Object = Annotated[dict[str, Any], BeforeValidator(lambda v: {} if v is None else v)]
_Flag = Annotated[bool, BeforeValidator(lambda v: False if v is None else v)]


class Message(BaseModel):
    """One request."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=(), allow_inf_nan=False)


M = TypeVar("M", bound=Message)


class CreateSession(Message):
    tags: list[_Text] | None = Field(default=None, max_length=100)
    user_metadata: _Object = Field(default_factory=dict)
    sdk_version: _Text | None = None
    project_id: _Text | None = None
    display_name: _Text | None = None


class OfSession(Message):
    session_id: _Id


class Finish(Message):
    detail: str | None = None


class CreateModel(OfSession):
    model_seq_id: _Number
    base_model: _Text
    user_metadata: _Object = Field(default_factory=dict)
    lora_config: _Object = Field(default_factory=dict)
    optimizer_config: dict[str, Any] | None = None


class OfModel(Message):
    model_id: _Id


class Positioned(OfModel):
    seq_id: _Position


class Place(Positioned):
    """Where a request of any kind stands, and of which sampler it is to give the weights."""

    path: Any = None
    sampling_session_seq_id: _Number | None = None


class OptimStep(Positioned):
    adam_params: dict[str, Any] | None = None
    optimizer_params: dict[str, Any] | None = None


class SaveWeights(Positioned):
    path: Annotated[str, Field(max_length=200)] | None = None
    sampling_session_seq_id: _Number | None = None
    ttl_seconds: Annotated[int, Field(ge=1, le=3650 * 86400)] | None = None
    overwrite: _Flag = False
    user_metadata: _Object = Field(default_factory=dict)
    age_encryption_recipients: list[Annotated[str, Field(max_length=4000)]] | None = Field(None, max_length=64)


class LoadWeights(Message):
    model_id: _Id | None = None
    seq_id: _Position | None = None
    session_id: _Id | None = None
    model_seq_id: _Number | None = None
    path: _Text
    optimizer: _Flag = False
    optimizer_config: dict[str, Any] | None = None
    base_model: _Text | None = None
    user_metadata: _Object = Field(default_factory=dict)
    weights_access_token: str | None = None


class CreateSampler(OfSession):
    sampling_session_seq_id: _Number
    base_model: _Text | None = None
    model_path: _Text | None = None


class OfSampler(Message):
    sampling_session_id: _Id


class Sample(Message):
    sampling_session_id: _Id | None = None
    seq_id: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    num_samples: int = 1
    prompt: _Object
    sampling_params: _Object = Field(default_factory=dict)
    prompt_logprobs: _Flag = False
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: dict[str, Any] | None = None
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None


class RetrieveFuture(Message):
    request_id: _Id


class FuturesTarget(OfSampler):
    cloned_sampler_id: _Number = 0


class RetrieveFutures(Message):
    target: FuturesTarget
    prev_cursor: _Number = 0
    timeout: float | None = None
    retrieved_request_ids: list[_Id] = Field(default_factory=list, max_length=100_000)


class LossInput(Message):
    name: Annotated[str, Field(max_length=64)]
    rank: int


class CreateCustomLoss(OfSession):
    custom_loss_seq_id: _Number
    name: _Text
    inputs: list[LossInput] = Field(max_length=64)
    graph: dict[str, Any]


class WeightsPath(Message):
    tinker_path: _Text


class Ttl(Message):
    ttl_seconds: Annotated[int, Field(ge=1, le=3650 * 86400)] | None = None


class SessionSearch(Message):
    type: Literal["session_search"] | None = None


def read(kind: type[M], value: Any) -> M:
    """A request in JSON as a value.

    Raises:
        InvalidRequestError: naming the fields; what was sent is not repeated.
    """
    try:
        return kind.model_validate(value)
    except (ValidationError, RecursionError) as e:
        problems = e.errors(include_input=False, include_url=False) if isinstance(e, ValidationError) else []
        fields = [".".join(str(part) for part in p["loc"]) or "body" for p in problems[:5]]
        text = "; ".join(f"{f}: {p['msg']}" for f, p in zip(fields, problems, strict=False)) or "nested too deeply"
        raise InvalidRequestError(
            text[:1000], field=(fields or ["body"])[0][:200], constraint=kind.__name__
        ) from None

"""Calls and their positions as the requests that carry them, and back."""

from __future__ import annotations

from typing import Any, Literal, cast

import numpy as np
from google.protobuf.message import Message

from tg_tinker.errors import InvalidRequestError
from tg_tinker.proto.v1 import common_pb2, sampling_pb2, training_pb2
from tg_tinker.types import BatchData
from tg_tinker.types.losses import Loss, check_data
from tg_tinker.types.optim import AdamParams
from tg_tinker.types.sampling import GenerationOptions
from tg_tinker.wire.calls import MAX_TTL_S, Call, Generate, Load, LossPass, Pass, Position, Save, Step, Updates
from tg_tinker.wire.datums import MAX_DATUMS, datum_from_bytes, datum_to_bytes
from tg_tinker.wire.json_text import json_from_text, json_to_text
from tg_tinker.wire.tensors import tensor_from_proto, tensor_to_proto

_BATCH_FIELDS = ("input_ids", "attention_mask", "labels")


def position_to_proto(position: Position) -> common_pb2.OperationKey:
    """A position as a message."""
    return common_pb2.OperationKey(run_id=position.run_id, seq=position.seq, handle=position.handle)


def position_from_proto(key: common_pb2.OperationKey) -> Position:
    """A position from a message."""
    return Position(run_id=key.run_id, seq=key.seq, handle=key.handle)


def call_to_proto(call: Call, position: Position) -> Message:  # noqa: PLR0911 - one for each call
    """The request message of a call; ``wire.methods.method_of(type(message))`` says where to send it."""
    key = position_to_proto(position)
    match call:
        case Pass():
            return _pass_to_proto(call, key)
        case LossPass():
            return _loss_pass_to_proto(call, key)
        case Updates():
            return training_pb2.AddUpdatesRequest(
                key=key, vectors=tensor_to_proto(call.vectors_UP), privacy_unit_ids=call.units
            )
        case Step():
            return training_pb2.OptimStepRequest(
                key=key,
                apply_dp_noise=call.apply_dp_noise,
                incomplete=call.incomplete,
                known_log_size=call.known_log_size,
                adam=None if call.adam is None else _adam_to_proto(call.adam),
            )
        case Save():
            return training_pb2.SaveStateRequest(
                key=key,
                include_optimizer=call.include_optimizer,
                metadata_json=json_to_text(call.metadata, field="metadata"),
                name=call.name,
                kind=call.kind,
                ttl_seconds=_ttl(call.ttl_seconds),
                overwrite=call.overwrite,
            )
        case Load():
            return training_pb2.LoadStateRequest(key=key, artifact_id=call.artifact_id, optimizer=call.optimizer)
        case Generate():
            return sampling_pb2.SampleRequest(
                key=key,
                prompts=call.prompts,
                params=sampling_to_proto(call.params, num_completions=call.num_completions),
            )


def call_from_proto(request: Message) -> Call:
    """The call in a request.

    Raises:
        InvalidRequestError: naming the field that cannot be what it says.
    """
    match request:
        case training_pb2.ForwardBackwardRequest():
            return _loss_pass_from_proto(request) if request.loss_fn else _pass_from_proto(request)
        case training_pb2.AddUpdatesRequest():
            return _updates_from_proto(request)
        case training_pb2.OptimStepRequest():
            return Step(
                apply_dp_noise=request.apply_dp_noise,
                incomplete=request.incomplete,
                known_log_size=request.known_log_size,
                adam=_adam_from_proto(request.adam) if request.HasField("adam") else None,
            )
        case training_pb2.SaveStateRequest():
            return _save_from_proto(request)
        case training_pb2.LoadStateRequest():
            optimizer = request.optimizer if request.HasField("optimizer") else None
            return Load(artifact_id=request.artifact_id, optimizer=optimizer)
        case sampling_pb2.SampleRequest():
            params, num_completions = sampling_from_proto(request.params)
            return Generate(prompts=tuple(request.prompts), params=params, num_completions=num_completions)
    raise TypeError(f"{type(request).__name__} is not an ordered call")


def sampling_to_proto(params: GenerationOptions, *, num_completions: int) -> sampling_pb2.SamplingParams:
    """Sampling options as a message."""
    if not -(2**63) <= num_completions < 2**63:
        raise InvalidRequestError("num_completions is out of range", field="num_completions", constraint="at least 1")
    return sampling_pb2.SamplingParams(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        stop_sequences=params.stop_sequences,
        num_completions=num_completions,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seed=params.seed,
    )


def sampling_from_proto(message: sampling_pb2.SamplingParams) -> tuple[GenerationOptions, int]:
    """Sampling options and the number of completions from a message."""
    params = GenerationOptions(
        max_tokens=message.max_tokens,
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k if message.HasField("top_k") else None,
        stop_sequences=tuple(message.stop_sequences),
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        seed=message.seed if message.HasField("seed") else None,
    )
    return params, message.num_completions


def _pass_to_proto(call: Pass, key: common_pb2.OperationKey) -> training_pb2.ForwardBackwardRequest:
    mode = training_pb2.PASS_MODE_TRAIN if call.train else training_pb2.PASS_MODE_EVAL
    if call.dataset_id:
        return training_pb2.ForwardBackwardRequest(key=key, mode=mode, dataset_id=call.dataset_id)
    tensors: dict[str, Any] = {
        name: tensor_to_proto(array) for name in _BATCH_FIELDS if (array := getattr(call.batch, name)) is not None
    }
    return training_pb2.ForwardBackwardRequest(
        key=key,
        mode=mode,
        privacy_unit_ids=call.units or (),
        batch_hash=call.batch_hash or "",
        dataset_id="",
        **tensors,
    )


def _loss_pass_to_proto(call: LossPass, key: common_pb2.OperationKey) -> training_pb2.ForwardBackwardRequest:
    return training_pb2.ForwardBackwardRequest(
        key=key,
        mode=training_pb2.PASS_MODE_TRAIN if call.train else training_pb2.PASS_MODE_EVAL,
        privacy_unit_ids=call.units or (),
        datums=[datum_to_bytes(datum) for datum in call.data],
        loss_fn=call.loss.name,
        loss_fn_config=call.loss.config,
        loss_id=call.loss.loss_id,
        coupling="" if call.coupling == "independent" else call.coupling,
    )


def _loss_pass_from_proto(request: training_pb2.ForwardBackwardRequest) -> LossPass:
    train = _trains(request)
    if any(request.HasField(name) for name in _BATCH_FIELDS) or request.dataset_id or request.batch_hash:
        raise InvalidRequestError(
            "a loss_fn is computed on datums; send datums or a batch, not both",
            field="data",
            constraint="datums or a batch",
        )
    if request.coupling not in ("", "batch"):
        raise InvalidRequestError("coupling is unknown", field="coupling", constraint="empty or batch")
    if len(request.datums) > MAX_DATUMS:
        raise InvalidRequestError(
            f"{len(request.datums)} datums; split them into several calls, they add up",
            field="data",
            constraint=f"at most {MAX_DATUMS}",
        )
    config: dict[str, float | str] = dict(request.loss_fn_config)
    if request.loss_id:
        config["loss_id"] = request.loss_id
    loss = Loss.of(request.loss_fn, config)
    data = tuple(datum_from_bytes(datum) for datum in request.datums)
    check_data(loss, data)
    return LossPass(
        data=data,
        loss=loss,
        train=train,
        units=tuple(request.privacy_unit_ids) or None,
        coupling="batch" if request.coupling else "independent",
    )


def _trains(request: training_pb2.ForwardBackwardRequest) -> bool:
    if request.mode not in (training_pb2.PASS_MODE_TRAIN, training_pb2.PASS_MODE_EVAL):
        raise InvalidRequestError("the pass has no mode", field="mode", constraint="train or eval")
    return request.mode == training_pb2.PASS_MODE_TRAIN


def _adam_to_proto(adam: AdamParams) -> training_pb2.AdamParams:
    return training_pb2.AdamParams(
        learning_rate=adam.learning_rate,
        beta1=adam.beta1,
        beta2=adam.beta2,
        eps=adam.eps,
        weight_decay=adam.weight_decay,
        grad_clip_norm=adam.grad_clip_norm,
    )


def _adam_from_proto(message: training_pb2.AdamParams) -> AdamParams:
    return AdamParams(
        learning_rate=message.learning_rate,
        beta1=message.beta1,
        beta2=message.beta2,
        eps=message.eps,
        weight_decay=message.weight_decay,
        grad_clip_norm=message.grad_clip_norm,
    )


def _save_from_proto(request: training_pb2.SaveStateRequest) -> Save:
    if request.kind not in ("", "state", "sampler", "external"):
        raise InvalidRequestError("kind is unknown", field="kind", constraint="state, sampler or external")
    return Save(
        include_optimizer=request.include_optimizer,
        metadata=json_from_text(request.metadata_json, field="metadata"),
        name=request.name,
        kind=cast("Literal['state', 'sampler', 'external']", request.kind or "state"),
        ttl_seconds=_ttl(request.ttl_seconds) if request.HasField("ttl_seconds") else None,
        overwrite=request.overwrite,
    )


def _ttl(seconds: int | None) -> int | None:
    if seconds is not None and not 1 <= seconds <= MAX_TTL_S:
        raise InvalidRequestError(
            f"ttl_seconds={seconds} is not possible; leave it out to keep the checkpoint",
            field="ttl_seconds",
            constraint=f"1 to {MAX_TTL_S}",
        )
    return seconds


def _pass_from_proto(request: training_pb2.ForwardBackwardRequest) -> Pass:
    train = _trains(request)
    if request.dataset_id:
        if any(request.HasField(name) for name in _BATCH_FIELDS) or request.privacy_unit_ids or request.batch_hash:
            raise InvalidRequestError(
                "the server draws the batch itself; send a batch or name a dataset, not both",
                field="dataset",
                constraint="a batch or a dataset",
            )
        return Pass.drawn_from(request.dataset_id, train=train)
    if not request.HasField("input_ids"):
        raise InvalidRequestError("batch has no input_ids", field="batch.input_ids", constraint="required")
    arrays = {
        name: tensor_from_proto(getattr(request, name), field=f"batch.{name}")
        for name in _BATCH_FIELDS
        if request.HasField(name)
    }
    return Pass(
        batch=BatchData(**arrays),
        train=train,
        units=tuple(request.privacy_unit_ids) or None,
        batch_hash=request.batch_hash or None,
    )


def _updates_from_proto(request: training_pb2.AddUpdatesRequest) -> Updates:
    vectors_UP = tensor_from_proto(request.vectors, field="vectors")
    if vectors_UP.dtype != np.float32 or vectors_UP.ndim != 2:
        raise InvalidRequestError(
            f"vectors are {vectors_UP.dtype} in {vectors_UP.ndim} dimensions; send float32 [rows, parameters]",
            field="vectors",
            constraint="float32 [rows, parameters]",
        )
    return Updates(vectors_UP=vectors_UP, units=tuple(request.privacy_unit_ids))

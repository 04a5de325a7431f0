"""Training requests of the protocol as the calls of ours. Read inside the run's lane, in the run's order."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError

from tg_tinker.errors import InvalidRequestError
from tg_tinker.exports import age
from tg_tinker.proto.v1 import gateway_pb2 as pb
from tg_tinker.types.datum import Datum
from tg_tinker.types.losses import Loss
from tg_tinker.wire.calls import Call, Load, LossPass, Save, Step
from tg_tinker_server.gateway import messages
from tg_tinker_server.gateway.privacy import step_params
from tg_tinker_server.gateway.requests import parse_json
from tg_tinker_server.gateway.tensors import DatumReader
from tg_tinker_server.service.run import Run
from tg_tinker_server.service.weight_files import RECIPIENTS

EPHEMERAL_TTL_S = 7 * 86400  # of weights that a client saved without a name, to sample from at once
MOST_DATUMS = 1 << 16
_PROTO, _JSON = b"p", b"j"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRequest:
    """A training request, read as far as its place in the queue.

    Attributes:
        name: of its route.
        body: in an encoding that is the same for every repetition.
        sampler: number of the sampler to make of what it saves, where one is asked for.
    """

    name: str
    model_id: str
    seq: int
    body: bytes
    sampler: int | None = None

    @property
    def operation(self) -> str:
        """What the operation is named in the lane and in the audit log."""
        return _OPERATIONS[self.name]


_OPERATIONS = {
    "forward_backward": "forward_backward",
    "forward": "forward_backward",
    "optim_step": "optim_step",
    "save_weights": "save_state",
    "save_weights_for_sampler": "save_state",
    "save_weights_external": "save_state",
    "load_weights": "load_state",
}


def request_of(name: str, data: bytes, *, protobuf: bool) -> TrainingRequest:
    """A body as a request that can be queued.

    Only its place is read here: its client has given the number away, so a request that says nothing else that can be
    done fails in its turn, under its own id.

    Raises:
        InvalidRequestError: it cannot be read, or does not say where it stands.
    """
    if protobuf:
        message = _parse(data)
        if message.seq_id < 1 or not message.model_id:
            raise InvalidRequestError("model_id or seq_id is missing", field="seq_id", constraint="from 1")
        if message.forward_only:
            name = "forward"
        body = _PROTO + message.SerializeToString(deterministic=True)
        return TrainingRequest(name=name, model_id=message.model_id[:128], seq=message.seq_id, body=body)
    value = parse_json(data)
    read = messages.read(messages.Place, value)
    return TrainingRequest(
        name=name,
        model_id=read.model_id,
        seq=read.seq_id,
        body=_JSON + canonical(value),
        sampler=read.sampling_session_seq_id if name == "save_weights_for_sampler" and read.path is None else None,
    )


def kept_request(name: str, model_id: str, seq: int, body: bytes) -> TrainingRequest:
    """A request that was kept, as it was."""
    return TrainingRequest(name=name, model_id=model_id, seq=seq, body=body)


def canonical(value: Any) -> bytes:
    """JSON in one spelling.

    Raises:
        InvalidRequestError: it is nested too deeply.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    except RecursionError as e:
        raise InvalidRequestError("the body is nested too deeply", field="body", constraint="flat") from e


@dataclass(frozen=True, slots=True)
class CallReader:
    """Makes calls of requests."""

    def has_effect(self, request: TrainingRequest) -> bool:
        """Whether it may change weights or the pending gradient."""
        return request.name in ("forward_backward", "optim_step", "load_weights")

    def read(self, run: Run, request: TrainingRequest) -> Call:
        """The call in a request.

        Raises:
            InvalidRequestError: naming the field that cannot be what it says.
        """
        encoding, data = request.body[:1], request.body[1:]
        if request.name in ("forward", "forward_backward"):
            train = request.name == "forward_backward"
            return _pass_of_proto(data, train) if encoding == _PROTO else _pass_of_json(parse_json(data), train)
        value = parse_json(data)
        if request.name == "optim_step":
            step = messages.read(messages.OptimStep, value)
            return Step(adam=step_params(run.config, step.adam_params, step.optimizer_params))
        if request.name == "load_weights":
            load = messages.read(messages.LoadWeights, value)
            return Load(artifact_id=load.path, optimizer=load.optimizer)
        return _save(request.name, messages.read(messages.SaveWeights, value))


def _parse(data: bytes) -> pb.ForwardBackwardRequest:
    message = pb.ForwardBackwardRequest()
    try:
        message.ParseFromString(data)
    except DecodeError as e:
        raise InvalidRequestError(
            "the body is not a ForwardBackwardRequest", field="body", constraint="ForwardBackwardRequest"
        ) from e
    return message


def _pass_of_proto(data: bytes, train: bool) -> LossPass:
    message = _parse(data)
    reader = DatumReader()
    config: dict[str, float | str] = dict(message.loss_fn_config)
    if message.loss_fn_config_v2:  # numbers are sent in both, texts in this one only
        pairs = message.loss_fn_config_v2.items()
        config = {k: v.text if v.WhichOneof("value") == "text" else v.number for k, v in pairs}
    return _pass(tuple(reader.from_proto(d) for d in message.data), message.loss_fn, config, train)


def _pass_of_json(value: Mapping[str, Any], train: bool) -> LossPass:
    inner = value.get("forward_backward_input") or value.get("forward_input")
    if not isinstance(inner, Mapping) or not isinstance(inner.get("data"), list):
        raise InvalidRequestError(
            "forward_backward_input is missing, or has no list of data",
            field="forward_backward_input",
            constraint="an object with data and loss_fn",
        )
    config = inner.get("loss_fn_config") or {}
    fits = isinstance(config, Mapping) and all(isinstance(v, int | float | str) for v in config.values())
    if not fits or not all(isinstance(d, Mapping) for d in inner["data"]):
        raise InvalidRequestError("loss_fn_config or data is not as it should be", field="data", constraint="objects")
    reader = DatumReader()
    data = tuple(reader.from_json(d) for d in inner["data"])
    return _pass(data, str(inner.get("loss_fn", ""))[:100], dict(config), train)


def _pass(data: tuple[Datum, ...], loss_fn: str, config: Mapping[str, float | str], train: bool) -> LossPass:
    if not data:
        raise InvalidRequestError(
            "the batch is empty; send at least one datum", field="data", constraint="at least one datum"
        )
    if len(data) > MOST_DATUMS:
        raise InvalidRequestError(
            f"{len(data)} datums in one request", field="data", constraint=f"at most {MOST_DATUMS}"
        )
    return LossPass(data=data, loss=Loss.of(loss_fn, config), train=train)


def _save(name: str, message: messages.SaveWeights) -> Save:
    metadata: dict[str, Any] = dict(message.user_metadata)
    if name == "save_weights":
        return Save(
            include_optimizer=True,
            metadata=metadata,
            name=_named(message),
            ttl_seconds=message.ttl_seconds,
            overwrite=message.overwrite,
        )
    if name == "save_weights_external":
        if message.age_encryption_recipients:
            age.check_recipients(message.age_encryption_recipients)
            metadata[RECIPIENTS] = list(message.age_encryption_recipients)
        return Save(
            include_optimizer=False,
            metadata=metadata,
            name=_named(message),
            kind="external",
            ttl_seconds=message.ttl_seconds,
        )
    if message.path is None:
        if message.sampling_session_seq_id is None:
            raise InvalidRequestError(
                "save_weights_for_sampler needs a path or a sampling_session_seq_id", field="path", constraint="one"
            )
        return Save(
            include_optimizer=False,
            metadata=metadata,
            kind="sampler",
            ttl_seconds=message.ttl_seconds or EPHEMERAL_TTL_S,
        )
    return Save(
        include_optimizer=False,
        metadata=metadata,
        name=_named(message),
        kind="sampler",
        ttl_seconds=message.ttl_seconds,
    )


def _named(message: messages.SaveWeights) -> str:
    if not message.path:
        raise InvalidRequestError("the checkpoint has no name", field="path", constraint="a name")
    return message.path

"""Training runs, configurations and the server's capabilities on the wire."""

from __future__ import annotations

import json

from pydantic import ValidationError

from tg_tinker.errors import InvalidRequestError
from tg_tinker.proto.v1 import runs_pb2
from tg_tinker.types import Capabilities, TrainingConfig
from tg_tinker.types.info import ModelInfo
from tg_tinker.types.run import PrivacyState, RunInfo
from tg_tinker.wire.times import time_from_proto, time_to_proto

# Of the protocol, "major.minor": a client and a server of different majors do not talk to each other.
API_VERSION = "1.0"


def config_to_json(config: TrainingConfig, *, as_asked: bool = False) -> str:
    """A configuration as JSON text; infinities stay infinities.

    Args:
        as_asked: without what was not set in its ``dp_config``: a server whose policy fills that in can then tell.

    Raises:
        InvalidRequestError: metadata or model_kwargs hold something that is not JSON.
    """
    try:
        values = config.model_dump()
        if as_asked and config.dp_config is not None:
            values["dp_config"] = config.dp_config.model_dump(exclude_unset=True)
        return json.dumps(values, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as e:
        raise InvalidRequestError(
            f"the configuration holds something that is not JSON (metadata and model_kwargs must be): {e}",
            field="config",
            constraint="JSON",
        ) from e


def config_from_json(text: str) -> TrainingConfig:
    """A configuration from JSON text.

    Raises:
        InvalidRequestError: naming the first field that is wrong.
    """
    try:
        return TrainingConfig.model_validate_json(text)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(p) for p in first["loc"]) or "config"
        raise InvalidRequestError(f"{where}: {first['msg']}", field=where, constraint=first["type"]) from e


def privacy_state_to_proto(state: PrivacyState) -> runs_pb2.PrivacyState:
    """A budget as a message."""
    return runs_pb2.PrivacyState(
        dataset_id=state.dataset_id,
        epsilon_spent=state.epsilon_spent,
        target_epsilon=state.target_epsilon,
        delta=state.delta,
        noise_multiplier=state.noise_multiplier,
        sample_rate=state.sample_rate,
        expected_batch_size=state.expected_batch_size,
        ledger_head=state.ledger_head,
    )


def privacy_state_from_proto(message: runs_pb2.PrivacyState) -> PrivacyState:
    """A budget from a message."""
    return PrivacyState(
        dataset_id=message.dataset_id,
        epsilon_spent=message.epsilon_spent,
        target_epsilon=message.target_epsilon,
        delta=message.delta,
        noise_multiplier=message.noise_multiplier,
        sample_rate=message.sample_rate,
        expected_batch_size=message.expected_batch_size,
        ledger_head=message.ledger_head,
    )


def run_info_to_proto(info: RunInfo) -> runs_pb2.RunInfo:
    """A run as a message."""
    return runs_pb2.RunInfo(
        run_id=info.run_id,
        config_json=config_to_json(info.config),
        status=info.status,
        step=info.step,
        created=time_to_proto(info.created),
        next_seq=info.next_seq,
        server_epoch=info.server_epoch,
        privacy=None if info.privacy is None else privacy_state_to_proto(info.privacy),
        trainable_parameters=info.trainable_parameters,
        base_dtype=info.base_dtype,
        model_ref=info.config.model_ref,
        unit_key=info.unit_key,
        family=info.family,
        tokenizer_id=info.tokenizer_id,
        request_id=info.request_id,
        updated=None if info.updated is None else time_to_proto(info.updated),
    )


def run_info_from_proto(message: runs_pb2.RunInfo) -> RunInfo:
    """A run from a message."""
    return RunInfo(
        run_id=message.run_id,
        config=config_from_json(message.config_json),
        status=message.status,
        step=message.step,
        created=time_from_proto(message.created),
        next_seq=message.next_seq,
        server_epoch=message.server_epoch,
        privacy=privacy_state_from_proto(message.privacy) if message.HasField("privacy") else None,
        trainable_parameters=message.trainable_parameters,
        base_dtype=message.base_dtype,
        unit_key=message.unit_key,
        family=message.family,
        tokenizer_id=message.tokenizer_id,
        request_id=message.request_id,
        updated=time_from_proto(message.updated) if message.HasField("updated") else None,
    )


def capabilities_to_proto(capabilities: Capabilities) -> runs_pb2.Capabilities:
    """What the server can do, as a message."""
    models = [
        runs_pb2.ModelInfo(
            name=m.name, family=m.family, parameters=m.parameters, max_sequence_length=m.max_sequence_length
        )
        for m in capabilities.models
    ]
    return runs_pb2.Capabilities(
        server_version=capabilities.server_version,
        api_version=capabilities.api_version,
        models=models,
        max_batch_records=capabilities.max_batch_records,
        max_request_bytes=capabilities.max_request_bytes,
        losses=capabilities.losses,
        optimizers=capabilities.optimizers,
        lr_schedulers=capabilities.lr_schedulers,
        reducers=capabilities.reducers,
        dp_sampling_modes=capabilities.dp_sampling_modes,
        dp_accountants=capabilities.dp_accountants,
        tenant_id=capabilities.tenant_id,
        api=capabilities.api,
    )


def capabilities_from_proto(message: runs_pb2.Capabilities) -> Capabilities:
    """What the server can do, from a message."""
    models = [
        ModelInfo(name=m.name, family=m.family, parameters=m.parameters, max_sequence_length=m.max_sequence_length)
        for m in message.models
    ]
    return Capabilities(
        server_version=message.server_version,
        api_version=message.api_version,
        models=models,
        max_batch_records=message.max_batch_records,
        max_request_bytes=message.max_request_bytes,
        losses=list(message.losses),
        optimizers=list(message.optimizers),
        lr_schedulers=list(message.lr_schedulers),
        reducers=list(message.reducers),
        dp_sampling_modes=list(message.dp_sampling_modes),
        dp_accountants=list(message.dp_accountants),
        tenant_id=message.tenant_id,
        api=list(message.api),
    )

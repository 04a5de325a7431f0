import math
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tg_tinker.errors import InvalidRequestError
from tg_tinker.proto.v1 import artifacts_pb2, runs_pb2
from tg_tinker.types import ArtifactInfo, Capabilities, DPConfig, LoRAConfig, OptimizerConfig, TrainingConfig
from tg_tinker.types.info import ModelInfo
from tg_tinker.types.run import PrivacyState, RunInfo
from tg_tinker.wire.artifacts import artifact_from_proto, artifact_to_proto
from tg_tinker.wire.runs import (
    capabilities_from_proto,
    capabilities_to_proto,
    config_from_json,
    config_to_json,
    run_info_from_proto,
    run_info_to_proto,
)
from tg_tinker.wire.times import time_from_proto, time_to_proto

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
NUMBER = st.floats(allow_nan=False)
COUNT = st.integers(-(2**63), 2**63 - 1)
TIME = st.datetimes(datetime(1970, 1, 1), datetime(9999, 12, 31), timezones=st.just(UTC))
CONFIG = st.builds(
    TrainingConfig,
    model_ref=TEXT.filter(bool),
    lora_config=st.none()
    | st.builds(LoRAConfig, rank=st.integers(1, 64), dropout=st.floats(0, 0.9), bias=st.just("all")),
    optimizer=st.builds(OptimizerConfig, learning_rate=st.floats(1e-9, 1), betas=st.just((0.5, 0.95))),
    dp_config=st.none()
    | st.builds(
        DPConfig,
        noise_multiplier=st.floats(0.01, 100) | st.just("auto"),
        target_epsilon=st.floats(0.01, 100),
        target_delta=st.floats(1e-12, 0.5),
        dataset_id=st.none() | st.text("abcxyz-_.é9", min_size=1, max_size=20),
    ),
    max_steps=st.integers(1, 1000),
    seed=st.none() | st.integers(-(2**60), 2**60),
    metadata=st.dictionaries(TEXT, TEXT | st.integers(-9, 9), max_size=3),
)
PRIVACY = st.builds(
    PrivacyState,
    dataset_id=TEXT,
    epsilon_spent=NUMBER,
    target_epsilon=NUMBER,
    delta=NUMBER,
    noise_multiplier=NUMBER,
    sample_rate=NUMBER,
    expected_batch_size=NUMBER,
    ledger_head=st.binary(max_size=32),
)


@given(CONFIG)
def test_a_configuration_survives_as_json(config):
    assert config_from_json(config_to_json(config)) == config


def test_an_infinite_target_stays_infinite():
    config = TrainingConfig(model_ref="m", dp_config=DPConfig(target_epsilon=math.inf))
    assert config_from_json(config_to_json(config)) == config


def test_a_configuration_that_is_not_json_is_refused():
    with pytest.raises(InvalidRequestError) as caught:
        config_to_json(TrainingConfig(model_ref="m", metadata={"when": object()}))
    assert caught.value.field == "config"


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('{"model_ref": "m", "batch_size": 0}', "batch_size"),
        ('{"model_ref": "m", "lora_config": {"rank": -1}}', "lora_config.rank"),
        ('{"model_ref": "m", "colour": 1}', "colour"),
        ("{", "config"),
    ],
)
def test_a_wrong_configuration_is_refused_by_field(text, field):
    with pytest.raises(InvalidRequestError) as caught:
        config_from_json(text)
    assert caught.value.field == field


@given(
    st.builds(
        RunInfo,
        run_id=TEXT,
        config=CONFIG,
        status=st.sampled_from(["active", "completed", "failed"]),
        step=COUNT,
        created=TIME,
        next_seq=st.integers(0, 2**64 - 1),
        server_epoch=TEXT,
        privacy=st.none() | PRIVACY,
        trainable_parameters=COUNT,
        base_dtype=TEXT,
        unit_key=st.binary(max_size=32),
    )
)
def test_a_run_survives_the_wire(info):
    assert run_info_from_proto(runs_pb2.RunInfo.FromString(run_info_to_proto(info).SerializeToString())) == info


def test_the_key_of_the_units_is_not_shown():
    info = RunInfo(
        run_id="r",
        config=TrainingConfig(model_ref="m"),
        status="active",
        step=0,
        created=datetime.now(UTC),
        unit_key=b"secret-key",
    )
    assert "secret-key" not in repr(info)


@given(
    st.builds(
        Capabilities,
        server_version=TEXT,
        api_version=TEXT,
        models=st.lists(
            st.builds(ModelInfo, name=TEXT, family=TEXT, parameters=COUNT, max_sequence_length=COUNT), max_size=2
        ),
        max_batch_records=COUNT,
        max_request_bytes=COUNT,
        losses=st.lists(TEXT, max_size=2),
        optimizers=st.lists(TEXT, max_size=2),
        lr_schedulers=st.lists(TEXT, max_size=2),
        reducers=st.lists(TEXT, max_size=2),
        dp_sampling_modes=st.lists(TEXT, max_size=2),
        dp_accountants=st.lists(TEXT, max_size=2),
        tenant_id=TEXT,
    )
)
def test_capabilities_survive_the_wire(capabilities):
    message = runs_pb2.Capabilities.FromString(capabilities_to_proto(capabilities).SerializeToString())
    assert capabilities_from_proto(message) == capabilities


@given(
    st.builds(
        ArtifactInfo,
        artifact_id=TEXT,
        training_client_id=TEXT,
        step=COUNT,
        size_bytes=COUNT,
        content_hash=TEXT,
        algorithm=TEXT,
        key_id=TEXT,
        timestamp=TIME,
        name=TEXT,
    )
)
def test_an_artifact_survives_the_wire(info):
    message = artifacts_pb2.ArtifactInfo.FromString(artifact_to_proto(info).SerializeToString())
    assert artifact_from_proto(message) == info


@given(TIME)
def test_a_time_survives_the_wire(moment):
    assert time_from_proto(time_to_proto(moment)) == moment


def test_a_time_without_a_zone_is_refused():
    with pytest.raises(InvalidRequestError, match="timezone"):
        time_to_proto(datetime(2026, 1, 1))

"""An impossible setting is named in one line that says what is possible."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import TrainingConfig
from tg_tinker_server.config import ServerConfig


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("micro_batch_tokens", 0, 'micro_batch_tokens: a whole number from 1, or "auto"; got 0'),
        ("micro_batch_tokens", True, 'micro_batch_tokens: a whole number from 1, or "auto"; got True'),
        ("micro_batch_tokens", "many", "micro_batch_tokens: a whole number from 1, or \"auto\"; got 'many'"),
        ("device", "gpu", 'device: "auto", "cpu", "cuda" or "cuda:1"; got \'gpu\''),
    ],
)
def test_an_impossible_setting_is_refused_in_one_line(name: str, value: Any, says: str) -> None:
    with pytest.raises(InvalidRequestError) as e:
        ServerConfig.load(None, {}, **{name: value})
    assert e.value.message == "server configuration: " + says


def test_settings_come_from_the_environment_and_tables_do_not() -> None:
    environment = {"TG_TINKER_SERVER_MICRO_BATCH_TOKENS": "512", "TG_TINKER_SERVER_DEVICE": "cuda:1"}
    config = ServerConfig.load(None, environment)
    assert (config.micro_batch_tokens, config.device) == (512, "cuda:1")
    with pytest.raises(InvalidRequestError, match="only the TOML file"):
        ServerConfig.load(None, {"TG_TINKER_SERVER_MODELS": "{}"})


@pytest.mark.parametrize("value", [0, True, "many"])
def test_an_impossible_micro_batch_size_is_one_error(value: Any) -> None:
    with pytest.raises(ValidationError, match='a whole number from 1, or "auto"; got') as e:
        TrainingConfig(model_ref="m", micro_batch_size=value)
    assert e.value.error_count() == 1

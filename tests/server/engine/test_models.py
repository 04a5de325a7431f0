"""Bad entries among the models are named at start; one that fails later takes nobody else's away."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch

from tg_tinker.errors import InvalidRequestError
from tg_tinker_server.engine.models import BUNDLED_MODELS, BaseModels

CPU = torch.device("cpu")


@pytest.mark.parametrize("source", ["/nowhere/model", "./nowhere", "~/nowhere", "some/where/deep", Path("nowhere")])
def test_a_folder_that_is_not_there_is_refused_at_start_by_its_name(source: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r'"mine" is .*where') as e:
        BaseModels({**BUNDLED_MODELS, "mine": source}, CPU)
    assert e.value.field == "models"


def test_a_folder_without_a_model_is_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"a folder without a config\.json"):
        BaseModels({"mine": str(tmp_path)}, CPU)


def test_a_hub_id_is_not_looked_for_at_start() -> None:
    BaseModels({"a": "organisation/model", "b": "gpt2"}, CPU)


def test_a_model_that_cannot_be_read_is_logged_and_the_others_are_offered(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    models = BaseModels({**BUNDLED_MODELS, "damaged": tmp_path}, CPU)
    with structlog.testing.capture_logs() as lines:
        assert [m.name for m in models.infos()] == ["tiny-llama-2m"]
    assert [(line["event"], line["model"]) for line in lines] == [("model_not_offered", "damaged")]


def test_models_that_are_loaded_at_the_same_time_all_have_their_weights() -> None:
    """transformers loads under defaults of the whole process; without a lock parameters stay on the meta device."""
    with ThreadPoolExecutor(6) as pool:
        loads = [pool.submit(BaseModels(BUNDLED_MODELS, CPU).load, "tiny-llama-2m", torch.float32) for _ in range(6)]
        loaded = [load.result().module for load in loads]
    first = dict(loaded[0].named_parameters())
    for module in loaded:
        for name, value in module.named_parameters():
            assert value.device == CPU
            assert torch.equal(value, first[name])

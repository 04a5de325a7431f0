"""Half precision is a matter of what the machine shows."""

import pytest

from tg_tinker_server.engine import precision
from tg_tinker_server.engine.performance import PerformanceConfig
from tg_tinker_server.engine.precision import bfloat16_pays
from tg_tinker_server.engine.torch_backend import TorchBackend


def measured(monkeypatch, seconds):
    monkeypatch.setattr(precision, "_seconds", lambda matrix: seconds[str(matrix.dtype).removeprefix("torch.")])
    return bfloat16_pays.__wrapped__("cpu")


def test_half_precision_pays_where_its_products_are_faster(monkeypatch):
    assert measured(monkeypatch, {"float32": 4.0, "bfloat16": 1.0})
    assert not measured(monkeypatch, {"float32": 1.2, "bfloat16": 1.0})
    assert not measured(monkeypatch, {"float32": 1.0, "bfloat16": 4.0})


def test_this_machine_gives_the_same_answer_twice():
    assert bfloat16_pays.__wrapped__("cpu") == bfloat16_pays.__wrapped__("cpu")


@pytest.mark.parametrize("pays", [True, False])
def test_a_small_model_never_asks_and_stays_in_float32(tools, monkeypatch, pays):
    monkeypatch.setattr("tg_tinker_server.engine.torch_backend.bfloat16_pays", lambda _: pays)
    monkeypatch.setattr("tg_tinker_server.engine.torch_backend.WIDE", 16)
    backend = TorchBackend({"tiny": tools.loaders["tiny"]}, PerformanceConfig())
    assert backend.open(run_id="a", config=tools.config()).base_dtype == ("bfloat16" if pays else "float32")
    assert backend.open(run_id="b", config=tools.config(mixed_precision="fp32")).base_dtype == "float32"
    assert backend.open(run_id="c", config=tools.config(dp={})).base_dtype == "float32"
    monkeypatch.setattr("tg_tinker_server.engine.torch_backend.WIDE", 17)
    assert backend.open(run_id="d", config=tools.config()).base_dtype == "float32"

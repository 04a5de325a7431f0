"""What the backend refuses before anybody uses it."""

from __future__ import annotations

import pytest
import torch

from tg_tinker.errors import InvalidRequestError
from tg_tinker_server.engine.performance import PerformanceConfig
from tg_tinker_server.engine.torch_backend import TorchBackend


@pytest.mark.parametrize(
    ("device", "gpus", "seen"),
    [
        ("cuda", 0, "no GPU here"),
        ("cuda:7", 0, "no GPU here"),
        ("cuda:7", 1, "one GPU, cuda:0, here"),
        ("cuda:2", 2, "cuda:0 to cuda:1 here"),
    ],
)
def test_a_device_that_is_not_there_is_refused_at_start(
    monkeypatch: pytest.MonkeyPatch, device: str, gpus: int, seen: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(
        InvalidRequestError, match=f'device = "{device}", but torch sees .*{seen}; set device = "cpu"'
    ):
        TorchBackend(performance=PerformanceConfig(device=device))

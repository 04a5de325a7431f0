"""A sampler whose engine is the toy worker, and weights of the bundled model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.server.engine.conftest import Bench
from tests.server.engine.sampling.conftest import Sampling
from tg_tinker_server.engine.models import BUNDLED_MODELS
from tg_tinker_server.engine.torch_backend import TorchBackend
from tg_tinker_server.engine.vllm import sampler
from tg_tinker_server.engine.vllm.settings import VllmConfig

TOY = Path(__file__).with_name("toy_worker.py")


@pytest.fixture(scope="session")
def bundled():
    """One backend for all tests: the model is loaded once."""
    return Bench(TorchBackend(BUNDLED_MODELS, vllm=VllmConfig(python=sys.executable)), "tiny-llama-2m")


@pytest.fixture
def routed(bundled, monkeypatch):
    """Requests to a sampler of its own; whatever it started is ended."""
    monkeypatch.setattr(sampler, "WORKER", TOY)
    sampling = Sampling(bundled)
    sampling.closing = []

    def run(**settings):
        session, weights = Sampling.run(sampling, **settings)
        sampling.closing.append(session)
        return session, weights

    sampling.run = run
    yield sampling
    sampling.sampler.close()
    sampling.close()
    for session in sampling.closing:
        session.close()

"""A sampler whose engine is the toy worker, and weights of the bundled model."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from tests.server.engine.conftest import Bench
from tests.server.engine.sampling.conftest import Sampling
from tests.server.engine.vllm.toy_worker import log_softmax, next_logits
from tg_tinker_server.engine.lora import own_parameters
from tg_tinker_server.engine.models import BUNDLED_MODELS
from tg_tinker_server.engine.torch_backend import TorchBackend
from tg_tinker_server.engine.vllm import sampler
from tg_tinker_server.engine.vllm.settings import VllmConfig
from tg_tinker_server.engine.vllm.trials import Trial

TOY = Path(__file__).with_name("toy_worker.py")


def toy_trial(weights):
    """What the toy worker should say of the text of a trial."""
    lift = 0.0
    if weights.adapter is not None:
        own = own_parameters(weights.base.module, weights.adapter)
        lift = lift_of({name: p.detach().numpy() for name, p in own.items()})
    tokens = (5, 9, 3, 14)
    logprobs_NV = np.array([log_softmax(next_logits(t, lift)) for t in tokens], dtype=np.float32)
    return Trial(tokens=tokens, logprobs_NV=logprobs_NV, allowed=1e-3)


def lift_of(tensors):
    """What the toy worker makes of an adapter; alpha is 32, the rank 4."""
    values = np.concatenate([v.reshape(-1) for v in tensors.values()]).astype(np.float64)
    return 1000 * 8 * values.mean()


@pytest.fixture(scope="session")
def bundled():
    """One backend for all tests: the model is loaded once."""
    return Bench(TorchBackend(BUNDLED_MODELS, vllm=VllmConfig(python=sys.executable)), "tiny-llama-2m")


@pytest.fixture
def routed(bundled, monkeypatch):
    """Requests to a sampler of its own; whatever it started is ended."""
    monkeypatch.setattr(sampler, "WORKER", TOY)
    monkeypatch.setattr(Trial, "of", toy_trial)
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

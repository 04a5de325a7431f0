"""Frozen weights of runs with random adapters, and what comes of requests."""

from __future__ import annotations

import numpy as np
import pytest

from tg_tinker.types.losses import Loss
from tg_tinker.types.tokens import SampleQuery, SamplingParams, response_of
from tg_tinker_server.engine.backend import EngineState, LossRequest


class Sampling:
    """A backend's sampler, the weights opened for it, and their sessions."""

    def __init__(self, bench, sampler=None):
        self.bench = bench
        self.sampler = sampler or bench.backend.token_sampler()
        self.opened, self.events = [], {}

    def base(self, model_ref=None):
        return self._open(self.bench.config(**({"model_ref": model_ref} if model_ref else {})), None)

    def run(self, seed=3, scale=0.1, **settings):
        """A session with random weights, and the same weights frozen."""
        session = self.bench.open(randomise=False, **settings)
        state = session.export_state(optimizer=False)
        rng = np.random.default_rng(seed)
        tensors = {k: rng.normal(0, scale, v.shape).astype(np.float32) for k, v in state.tensors.items()}
        state = EngineState(tensors=tensors, scalars=state.scalars)
        session.import_state(state, optimizer=False)
        return session, self._open(self.bench.config(**settings), state)

    def _open(self, config, state):
        weights = self.bench.backend.open_weights(config, state)
        self.opened.append(weights)
        return weights

    def submit(self, weights, prompt, *, group="all", params=None, **options):
        query = SampleQuery(prompt=tuple(prompt), params=SamplingParams(**({"stop": []} | (params or {}))), **options)
        return self.sampler.submit(weights, query, group=group)

    def step(self, times=1):
        """Some slices; what came of them is kept for ``results``, the latest is returned."""
        for _ in range(times):
            latest = self.sampler.step()
            for progress in latest:
                if progress.error is not None:
                    self.events[progress.ticket] = progress.error
                else:
                    self.events.setdefault(progress.ticket, []).extend(progress.events)
        return latest

    def results(self, *, most=10_000):
        """What came of each ticket: a response, or an error."""
        while not self.sampler.idle:
            self.step()
            most -= 1
            assert most
        events, self.events = self.events, {}
        return {t: e if isinstance(e, Exception) else response_of(e) for t, e in events.items()}

    def one(self, weights, prompt, **options):
        """One request alone."""
        ticket = self.submit(weights, prompt, **options)
        result = self.results()[ticket]
        if isinstance(result, Exception):
            raise result
        return result

    def close(self):
        for weights in self.opened:
            weights.close()


def training_logprobs(session, text):
    """Log-probabilities of a text's tokens but the first, by the training forward of a session."""
    ids = np.array(text, dtype=np.int64)
    request = LossRequest(
        tokens=(ids[:-1],),
        inputs=({"target_tokens": ids[1:], "weights": np.ones(len(ids) - 1, dtype=np.float32)},),
        loss=Loss(name="cross_entropy"),
        train=False,
    )
    return session.forward_backward(request).logprobs[0]


def prompts(*lengths, seed=1):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, n).tolist() for n in lengths]


@pytest.fixture
def sampling(bench):
    """Both backends, one after the other."""
    it = Sampling(bench)
    yield it
    it.close()


@pytest.fixture
def torch_sampling(torch_bench):
    it = Sampling(torch_bench)
    yield it
    it.close()

"""Models of a few thousand parameters, sessions whose adapters are not zero, and batches of random records."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tg_tinker.types import BatchData, DPConfig, LoRAConfig, OptimizerConfig, TrainingConfig
from tg_tinker_server.dp.mechanism import GaussianMechanism
from tg_tinker_server.dp.rng import SecureNormal
from tg_tinker_server.engine.backend import EngineState, PassRequest, StepRequest
from tg_tinker_server.engine.bigram import BigramBackend
from tg_tinker_server.engine.performance import PerformanceConfig
from tg_tinker_server.engine.requests import units_of
from tg_tinker_server.engine.tokenizers import ByteTokenizer
from tg_tinker_server.engine.torch_backend import TorchBackend
from tg_tinker_server.engine.vector import VectorSession, WithVectors

VOCAB = ByteTokenizer.vocab_size
SIZES = {"vocab_size": VOCAB, "initializer_range": 0.2}
LLAMA_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **SIZES,
}


def seeded(build):
    def load():
        with torch.random.fork_rng():
            torch.manual_seed(11)
            return build(), ByteTokenizer()

    return load


def tiny_llama(**settings):
    return LlamaForCausalLM(LlamaConfig(**LLAMA_SIZES, **settings))


def tiny_qwen():
    return Qwen2ForCausalLM(Qwen2Config(**LLAMA_SIZES))


def tiny_gpt2(dropout=0.0):
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=64,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            **SIZES,
        )
    )


def tiny_opt():
    return OPTForCausalLM(
        OPTConfig(
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            word_embed_proj_dim=16,
            dropout=0.0,
            vocab_size=VOCAB,
            init_std=0.2,
        )
    )


LOADERS = {
    "tiny": seeded(tiny_llama),
    "qwen": seeded(tiny_qwen),
    "gpt2": seeded(tiny_gpt2),
    "gpt2-dropout": seeded(lambda: tiny_gpt2(0.2)),
    "opt": seeded(tiny_opt),
}


class Bench:
    """Opens sessions with short configurations and closes them at the end."""

    def __init__(self, backend, model_ref):
        self.backend, self.model_ref, self.sessions = backend, model_ref, []

    def config(self, *, dp=None, lora=None, optimizer=None, **overrides):
        settings = {
            "model_ref": self.model_ref,
            "lora_config": self.lora(lora or {}),
            "optimizer": OptimizerConfig(**(optimizer or {})),
            "dp_config": None if dp is None else DPConfig(**({"target_epsilon": None} | dp)),
            "max_sequence_length": 64,
            **overrides,
        }
        return TrainingConfig(**settings)

    def lora(self, settings):
        return LoRAConfig(**({"rank": 4, "target_modules": ["q_proj", "v_proj"]} | settings))

    def open(self, *, randomise=True, **settings):
        """A session whose trained parameters are all random: a zero half of an adapter hides mistakes."""
        session = self.backend.open(run_id=f"run-{len(self.sessions)}", config=self.config(**settings))
        self.sessions.append(session)
        if randomise:
            state = session.export_state(optimizer=False)
            rng = np.random.default_rng(3)
            tensors = {k: rng.normal(0, 0.1, v.shape).astype(np.float32) for k, v in state.tensors.items()}
            session.import_state(EngineState(tensors=tensors, scalars=state.scalars), optimizer=False)
        return session

    def close(self):
        for session in self.sessions:
            session.close()


class VectorBench(Bench):
    """Runs on a vector, which have no adapter."""

    def lora(self, settings):
        assert not settings, "a vector has no adapter"


def make_batch(records=4, tokens=9, *, seed=0, padded=False, masked_prompt=False, left=False):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 256, (records, tokens))
    lengths = rng.integers(3, tokens + 1, records) if padded else np.full(records, tokens)
    mask = (np.arange(tokens) < lengths[:, None]).astype(np.int64)
    if left:
        mask = mask[:, ::-1].copy()
    labels = np.where(mask == 1, ids, -100)
    if masked_prompt:
        labels[:, : tokens // 3] = -100
    return BatchData(input_ids=ids, attention_mask=mask, labels=labels)


def run_pass(session, batch, **options):
    request = PassRequest.of_batch(batch, **options)
    if isinstance(session, VectorSession):
        return session.contribute(vectors_of(session, request), names_of(request))
    return session.forward_backward(request)


def vectors_of(session, request):
    """A row for each record, a function of its tokens alone, so that the suite's batches go to a vector too."""
    rows = [
        np.random.default_rng(ids[mask == 1].tolist()).normal(0, 0.1, session.trainable_parameters)
        for ids, mask in zip(request.input_ids_BT, request.attention_mask_BT, strict=True)
    ]
    return np.array(rows, dtype=np.float32).reshape(-1, session.trainable_parameters)


def names_of(request):
    if request.units is not None:
        return request.units
    names, unit_of_B = units_of(request)
    return tuple(names[i] for i in unit_of_B)


def accumulate(session, batch, **options):
    result = run_pass(session, batch, **options)
    session.accumulate(result.contribution)
    return result


def rows(batch, index):
    index = list(index)
    return BatchData(
        input_ids=batch.input_ids[index], attention_mask=batch.attention_mask[index], labels=batch.labels[index]
    )


class NoNoise:
    """A stand-in for the secure generator that shows what would have been noised."""

    def __init__(self):
        self.drawn = 0

    def normals(self, count):
        self.drawn += count
        return np.zeros(count)


def weights_of(session):
    return {k: v.tobytes() for k, v in session.export_state(optimizer=True).tensors.items()}


def flat_weights(session):
    state = session.export_state(optimizer=False)
    return np.concatenate([state.tensors[k].ravel() for k in sorted(state.tensors)])


def mechanism(multiplier=1.0, bound=1.0, rng=None):
    return GaussianMechanism(multiplier, bound, rng or SecureNormal())


def step(session, learning_rate=0.1, **options):
    return session.step(StepRequest(learning_rate=learning_rate, **options))


@pytest.fixture(scope="session")
def tools():
    """Helpers of this folder, by name."""
    return SimpleNamespace(
        accumulate=accumulate,
        batch=make_batch,
        config=lambda **settings: Bench(None, "tiny").config(**settings),
        flat_weights=flat_weights,
        loaders=LOADERS,
        mechanism=mechanism,
        no_noise=NoNoise,
        rows=rows,
        run_pass=run_pass,
        seeded=seeded,
        step=step,
        tiny_llama=tiny_llama,
        weights_of=weights_of,
    )


@pytest.fixture(scope="session")
def torch_models():
    """One backend for the whole suite: sessions of all tests share its base models, as they must."""
    warnings.filterwarnings("ignore", message="Full backward hook")
    return TorchBackend(LOADERS, PerformanceConfig(micro_batch_tokens=40))


def bench_of(backend, model_ref, kind=Bench):
    bench = kind(backend, model_ref)
    yield bench
    bench.close()


@pytest.fixture(params=["bigram", "torch"])
def bench(request):
    """Both backends, one after the other."""
    backend = BigramBackend() if request.param == "bigram" else request.getfixturevalue("torch_models")
    yield from bench_of(backend, "bigram" if request.param == "bigram" else "tiny")


@pytest.fixture(params=["bigram", "torch", "vector"])
def any_bench(request):
    """Every backend, for promises that need no tokens."""
    if request.param == "vector":
        yield from bench_of(WithVectors(BigramBackend()), "vector:1200", VectorBench)
    else:
        yield from bench_of(
            *(
                (BigramBackend(), "bigram")
                if request.param == "bigram"
                else (request.getfixturevalue("torch_models"), "tiny")
            )
        )


@pytest.fixture
def torch_bench(torch_models):
    """The torch backend's tiny Llama."""
    yield from bench_of(torch_models, "tiny")


@pytest.fixture
def fresh_bench():
    """A torch backend that nobody else uses."""
    yield from bench_of(TorchBackend(LOADERS, PerformanceConfig(micro_batch_tokens=40)), "tiny")

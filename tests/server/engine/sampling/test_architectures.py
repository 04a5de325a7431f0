"""Models whose caches differ: windows, alibi, experts, recurrent state. Each against its own whole forward pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as t

from tests.server.engine.conftest import LLAMA_SIZES, VOCAB, Bench, seeded
from tests.server.engine.sampling.conftest import Sampling, prompts
from tg_tinker_server.engine.performance import PerformanceConfig
from tg_tinker_server.engine.sampling.token_sampler import BatchedSampler
from tg_tinker_server.engine.sampling.torch_rows import TorchRows
from tg_tinker_server.engine.torch_backend import TorchBackend

SMALL = {"vocab_size": VOCAB, "hidden_size": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
MODELS = {
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**LLAMA_SIZES, sliding_window=6)),
    "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**LLAMA_SIZES, head_dim=4, sliding_window=6)),
    "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**LLAMA_SIZES, head_dim=4, sliding_window=6)),
    "qwen3-moe": lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**LLAMA_SIZES, head_dim=4, **EXPERTS)),
    "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(**SMALL, n_layer=2, n_head=2)),
    "falcon": lambda: t.FalconForCausalLM(
        t.FalconConfig(**SMALL, num_hidden_layers=2, num_attention_heads=2, alibi=True)
    ),
    "mamba": lambda: t.MambaForCausalLM(t.MambaConfig(**SMALL, num_hidden_layers=1, state_size=4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_any_kind_is_sampled_as_it_computes_a_whole_text(name):
    backend = TorchBackend({name: seeded(MODELS[name])}, PerformanceConfig(micro_batch_tokens=40))
    model = TorchRows()
    sampling = Sampling(
        Bench(backend, name), BatchedSampler(model, most_rows=8, prefix_bytes=2**20, prefill_tokens=7)
    )
    weights = sampling.base()
    texts = prompts(5, 19, 1, 11)  # some longer than a window, and all read in pieces
    texts.append([*texts[1], 7, 8])
    tickets = [
        sampling.submit(weights, text, params={"temperature": 0.0, "max_tokens": 14}, prompt_logprobs=bool(i % 2))
        for i, text in enumerate(texts)
    ]
    found = sampling.results()
    for text, ticket in zip(texts, tickets, strict=True):
        tokens = [*text, *found[ticket].sequences[0].tokens]
        with torch.no_grad():
            logprobs = weights.base.module(torch.tensor([tokens]), use_cache=False).logits[0].log_softmax(-1)
        expected = [logprobs[i - 1, tokens[i]] for i in range(1, len(tokens))]
        np.testing.assert_allclose(found[ticket].sequences[0].logprobs, expected[len(text) - 1 :], atol=1e-5)
        if found[ticket].prompt_logprobs is not None:
            np.testing.assert_allclose(found[ticket].prompt_logprobs[1:], expected[: len(text) - 1], atol=1e-5)
    # A recurrent state cannot be taken apart, so its sequences are computed from their beginning.
    assert (model.key(weights) is None) == (name == "mamba")

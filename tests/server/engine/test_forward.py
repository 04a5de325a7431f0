"""Shortcuts are taken where they were tried and found equal, and nowhere else."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig

from tg_tinker.types import BatchData
from tg_tinker_server.engine.forward import CausalLM
from tg_tinker_server.engine.losses import Targets, record_losses
from tg_tinker_server.engine.torch_backend import TorchBackend

VOCAB = 260


def capped_gemma(initializer_range=0.4):
    """Its logits are capped after the last layer."""
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=64,
            sliding_window=32,
            initializer_range=initializer_range,
            final_logit_softcapping=1.0,
            query_pre_attn_scalar=8,
        )
    ).eval()


class Bidirectional(nn.Module):
    """Every token sees the mean over all that the mask allows."""

    config = LlamaConfig(vocab_size=VOCAB)

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.head = nn.Linear(8, VOCAB)

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        x = self.embed(input_ids)
        mean = (x * mask[..., None]).sum(1, keepdim=True) / mask.sum(1)[:, None, None]
        return type("Out", (), {"logits": self.head(x + mean)})()


def found(build):
    torch.manual_seed(0)
    return CausalLM(build().requires_grad_(False), vocab_size=VOCAB)


def test_a_plain_model_takes_both_shortcuts_and_draws_nothing(tools):
    for name in ("tiny", "qwen", "gpt2", "opt"):
        frozen = tools.loaders[name]()[0].requires_grad_(False)
        shortcuts = CausalLM(frozen, vocab_size=VOCAB).shortcuts
        assert (shortcuts.split_head, shortcuts.maskless, shortcuts.random) == (True, True, False), name


def test_dropout_in_the_model_is_noticed(tools):
    generator = torch.get_rng_state()
    assert CausalLM(tools.loaders["gpt2-dropout"]()[0], vocab_size=VOCAB).shortcuts.random
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("initializer_range", [0.4, 0.001])
def test_logits_that_are_changed_after_the_last_layer_are_the_models_own(initializer_range):
    """Small logits are hardly changed by a cap; it must be found all the same."""
    lm = found(lambda: capped_gemma(initializer_range))
    assert not lm.shortcuts.split_head
    ids = torch.randint(VOCAB, (2, 6))
    assert torch.equal(lm.losses(ids, None, ids).sum_B, record_losses(lm.logits(ids), ids).sum_B)


def test_attention_that_sees_what_follows_keeps_its_mask(tools):
    lm = found(Bidirectional)
    assert (lm.shortcuts.split_head, lm.shortcuts.maskless) == (False, False)
    backend = TorchBackend({"tiny": lambda: (Bidirectional(), tools.loaders["tiny"]()[1])})
    session = backend.open(run_id="r", config=tools.config(lora={"target_modules": ["head"]}))
    short = BatchData(input_ids=[[5, 6, 7]])
    padded = BatchData(input_ids=[[5, 6, 7, 9, 9], [1, 2, 3, 4, 5]], attention_mask=[[1, 1, 1, 0, 0], [1] * 5])
    alone, beside = tools.run_pass(session, short), tools.run_pass(session, padded)
    other = tools.run_pass(session, BatchData(input_ids=[[1, 2, 3, 4, 5]]))
    assert beside.loss_sum == pytest.approx(alone.loss_sum + other.loss_sum, rel=1e-5)


def test_a_masked_token_that_predicts_something_sees_what_the_mask_says(torch_bench, tools):
    """Labels on masked positions are unusual and allowed; leaving the mask out would change them."""
    session = torch_bench.open()
    batch = tools.batch(3, padded=True)
    labels = batch.input_ids.copy()
    everywhere = BatchData(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels)
    with session.base.by_peft(session.adapter), torch.no_grad():
        logits = session.lm.logits(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask))
    expected = float(record_losses(logits, torch.from_numpy(labels)).sum_B.sum())
    assert tools.run_pass(session, everywhere, train=False).loss_sum == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("model", ["tiny", "gpt2", "opt"])
def test_a_record_is_the_same_on_whichever_side_and_however_far_it_is_padded(torch_bench, tools, model):
    targets = {"tiny": ["q_proj"], "gpt2": ["c_attn"], "opt": ["q_proj"]}[model]
    session = torch_bench.open(model_ref=model, lora={"target_modules": targets}, dp={"max_grad_norm": 0.5})
    record = [5, 6, 7, 8, 9]
    whole = tools.run_pass(session, BatchData(input_ids=[record]))
    for width in (7, 12):
        mask = [[0] * (width - 5) + [1] * 5]
        found = tools.run_pass(session, BatchData(input_ids=[[0] * (width - 5) + record], attention_mask=mask))
        assert found.num_targets == whole.num_targets == 4
        assert found.loss == pytest.approx(whole.loss, rel=1e-6)
        np.testing.assert_allclose(found.contribution.sum_P, whole.contribution.sum_P, rtol=1e-4, atol=1e-7)


def test_the_shortcut_and_the_models_own_logits_give_the_same_losses(torch_bench, tools):
    session = torch_bench.open(lora={"target_modules": "all-linear"})
    batch = tools.batch(4, padded=True, masked_prompt=True)
    ids, mask, labels = (torch.from_numpy(a) for a in (batch.input_ids, batch.attention_mask, batch.labels))
    with session.base.computing(session.adapter), torch.no_grad():
        torch.testing.assert_close(
            session.lm.losses(ids, None, labels).mean_B, record_losses(session.lm.logits(ids, mask), labels).mean_B
        )


@pytest.mark.parametrize("build", [capped_gemma, Bidirectional, "tiny", "gpt2", "opt"])
def test_log_probabilities_are_the_models_own_whatever_shortcut_is_taken(tools, build):
    lm = found(build if callable(build) else lambda: tools.loaders[build]()[0])
    generator = torch.Generator().manual_seed(3)
    ids_BT, token_NK = (torch.randint(VOCAB, shape, generator=generator) for shape in ((3, 7), (5, 4)))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 4:] = 0
    targets = Targets(row_N=torch.tensor([0, 0, 1, 1, 2]), position_N=torch.tensor([0, 6, 0, 3, 2]), token_N=token_NK)
    with torch.no_grad():
        given = None if lm.shortcuts.maskless else mask_BT
        logprobs_NK = lm.logprobs(ids_BT, given, targets)
        logits_BTV = lm.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
    expected = torch.log_softmax(logits_BTV[targets.row_N, targets.position_N], dim=-1).gather(1, token_NK)
    torch.testing.assert_close(logprobs_NK, expected, rtol=1e-5, atol=1e-5)

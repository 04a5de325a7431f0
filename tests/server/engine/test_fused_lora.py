"""Per-sample gradients against a loop that knows nothing of them: one record at a time, PEFT and autograd alone."""

import functools

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.grad_sample import GradSampleHooks
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from tg_tinker.errors import DPUnsupportedError
from tg_tinker.types import BatchData
from tg_tinker_server.engine.backend import StepRequest
from tg_tinker_server.engine.losses import record_losses
from tg_tinker_server.engine.performance import PerformanceConfig
from tg_tinker_server.engine.torch_backend import TorchBackend
from tg_tinker_server.engine.torch_pass import TorchPass

FAMILIES = {
    "tiny": ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"],
    "qwen": ["q_proj", "v_proj", "gate_proj"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "opt": ["q_proj", "out_proj"],
}


@pytest.fixture(autouse=True)
def norms_in_the_model_s_precision(monkeypatch):
    """These models' norms round to float32 whatever they are given, which hides everything beyond 1e-8."""

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    monkeypatch.setattr(Qwen2RMSNorm, "forward", forward)


def float64_session(tools, bench_config, model="tiny", micro_batch_tokens=60):
    """A session that computes in float64 throughout, its adapter random."""
    backend = TorchBackend({model: tools.loaders[model]}, PerformanceConfig(micro_batch_tokens=micro_batch_tokens))
    session = backend.open(run_id="r", config=bench_config)
    session.base.module.double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in session.parameters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    return session


def one_by_one(session, batch):
    """Each record's gradient [B, P]: cut to its own length, alone, by PEFT's own layers and autograd."""
    grads = []
    for ids, mask, labels in zip(batch.input_ids, batch.attention_mask, batch.labels, strict=True):
        length = int(mask.sum())
        with session.base.by_peft(session.adapter):
            logits = session.base.module(input_ids=torch.from_numpy(ids[None, :length]), use_cache=False).logits
            loss = record_losses(logits, torch.from_numpy(labels[None, :length])).mean_B.sum()
            parts = torch.autograd.grad(loss, list(session.parameters.values()), allow_unused=True)
        parts = [
            torch.zeros_like(p) if g is None else g for g, p in zip(parts, session.parameters.values(), strict=True)
        ]
        grads.append(torch.cat([g.reshape(-1) for g in parts]).numpy())
    return np.stack(grads)


def clipped_sum(grads_BP, units, bound):
    total = np.zeros(grads_BP.shape[1])
    for unit in dict.fromkeys(units):
        grad = sum(g for g, u in zip(grads_BP, units, strict=True) if u == unit)
        norm = np.linalg.norm(grad)
        total += grad * (min(1.0, bound / norm) if norm else 0.0)
    return total


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-300)


@st.composite
def cases(draw):
    records, tokens = draw(st.integers(1, 6)), draw(st.integers(2, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    lengths = rng.integers(2, tokens + 1, records)
    mask = (np.arange(tokens) < lengths[:, None]).astype(np.int64)
    ids = rng.integers(0, 256, (records, tokens))
    labels = np.where((mask == 1) & (rng.random(mask.shape) < draw(st.sampled_from([0.3, 0.7, 1.0]))), ids, -100)
    units = [f"u{i}" for i in rng.integers(0, draw(st.integers(1, records)), records)]
    return {
        "model": draw(st.sampled_from(list(FAMILIES))),
        "rank": draw(st.integers(1, 6)),
        "bound": draw(st.sampled_from([1e-3, 1.0, 1e3])),
        "micro_batch_tokens": draw(st.sampled_from([1, 17, 1000])),
        "calls": draw(st.integers(1, 3)),
        "checkpointing": draw(st.booleans()),
        "batch": BatchData(input_ids=ids, attention_mask=mask, labels=labels),
        "units": units,
    }


@given(case=cases())
@settings(max_examples=60, deadline=None)
def test_the_clipped_sum_of_a_logical_batch_is_that_of_the_loop_in_float64(torch_models, tools, case):
    config = tools.config(
        model_ref=case["model"],
        dp={"max_grad_norm": case["bound"], "merge_units": True},
        lora={"rank": case["rank"], "target_modules": FAMILIES[case["model"]]},
        gradient_checkpointing=case["checkpointing"],
    )
    session = float64_session(tools, config, case["model"], case["micro_batch_tokens"])
    batch, units = case["batch"], case["units"]
    expected = clipped_sum(one_by_one(session, batch), units, case["bound"])
    whole = tools.run_pass(session, batch, units=units)
    assert relative_error(whole.contribution.sum_P, expected) < 1e-9
    for index in np.array_split(np.arange(len(units)), case["calls"]):
        if len(index):
            tools.accumulate(session, tools.rows(batch, index), units=[units[i] for i in index])
    released = session._pending.release(StepRequest(learning_rate=0.0))
    # Units whose records came in several calls are kept in float32 until the step, and the release is float32.
    assert relative_error(released.grad_P * session._config.expected_batch_size, expected) < 1e-5


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("micro_batch_size", [1, 3, "auto"])
def test_a_unit_larger_than_a_slice_is_clipped_once_over_all_of_them(tools, micro_batch_size, merge):
    config = tools.config(
        dp={"max_grad_norm": 0.5, "merge_units": merge}, micro_batch_size=micro_batch_size, loss_scale=1.0
    )
    session = float64_session(tools, config, micro_batch_tokens=30)
    batch, units = tools.batch(12, padded=True), list("aabaacaaadaa")
    expected = clipped_sum(one_by_one(session, batch), units, 0.5)
    result = tools.run_pass(session, batch, units=units)
    assert relative_error(result.contribution.sum_P, expected) < 1e-9
    assert sorted(result.contribution.units) == list("abcd")
    assert len(result.contribution.norms_U) == 4


def test_a_large_unit_that_is_not_finite_adds_exactly_zero(tools, monkeypatch):
    session = float64_session(tools, tools.config(dp={"max_grad_norm": 0.5}, micro_batch_size=2))
    batch, units = tools.batch(6), list("aaaabc")
    expected = clipped_sum(one_by_one(session, batch)[4:], "bc", 0.5)
    part = TorchPass.part

    def poisoned(self, gradient):
        if self.slice_number == 1:
            gradient[0, 0] = float("nan")
        return part(self, gradient)

    monkeypatch.setattr(TorchPass, "part", poisoned)
    result = tools.run_pass(session, batch, units=units)
    assert relative_error(result.contribution.sum_P, expected) < 1e-9
    assert np.isnan(result.contribution.norms_U).sum() == 1


@pytest.mark.parametrize("model", FAMILIES)
def test_float32_agrees_with_opacus_hooks(torch_models, torch_bench, tools, model):
    """Opacus's own hooks on PEFT's own layers give the same gradient for every record and every parameter."""
    session = torch_bench.open(model_ref=model, dp={}, lora={"target_modules": FAMILIES[model]})
    batch = tools.batch(3, padded=True, masked_prompt=True)
    ids, mask, labels = (torch.from_numpy(a) for a in (batch.input_ids, batch.attention_mask, batch.labels))
    own = session.parameters
    layers = nn.ModuleList(
        m for m in session.base.module.modules() if any(p is q for q in own.values() for p in m._parameters.values())
    )
    hooks = GradSampleHooks(layers, loss_reduction="sum")
    try:
        session.base.module.train()
        with session.base.by_peft(session.adapter):
            logits = session.base.module(input_ids=ids, attention_mask=mask, use_cache=False).logits
            record_losses(logits, labels).mean_B.sum().backward()
        theirs = {name: p.grad_sample.clone() for name, p in own.items()}
    finally:
        hooks.cleanup()
        for parameter in own.values():
            parameter.grad = None
        session.base.module.eval()
    with session.recording(3) as rows, session.base.computing(session.adapter, grads=rows):
        session.lm.losses(ids, mask, labels).mean_B.sum().backward()
    for name, parameter in own.items():
        ours = rows.columns.by_parameter[id(parameter)].of(rows.matrix_NW)
        assert relative_error(ours.numpy(), theirs[name].numpy()) < 1e-5, name
        assert torch.equal(parameter.grad_sample, ours), "as Opacus's optimizers would find it"


@pytest.mark.parametrize("reentrant", [False, True])
def test_both_kinds_of_checkpointing_change_no_gradient(tools, reentrant):
    config = tools.config(
        dp={"max_grad_norm": 1e3}, lora={"target_modules": "all-linear"}, gradient_checkpointing=True
    )
    session, batch = float64_session(tools, config, micro_batch_tokens=1000), tools.batch(4, padded=True)
    expected = one_by_one(session, batch).sum(axis=0)
    model = session.base.module
    calls = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    model.enable_input_require_grads()  # which the reentrant kind needs, as everywhere
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    session.base._checkpointing = True  # the pass leaves it as it is
    found = tools.run_pass(session, batch).contribution.sum_P
    assert relative_error(found, expected) < 1e-9
    assert len(calls) == 2 * len(model.model.layers), "each layer ran forward, and once more in the backward pass"


class Twice(nn.Module):
    """Runs a part of a model two times in one forward pass."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return 0.5 * (self.inner(*args, **kwargs) + self.inner(*args, **kwargs) * 1.5)


def test_a_module_used_twice_adds_up(tools):
    def build():
        model = tools.tiny_llama()
        for layer in model.model.layers:
            layer.mlp = Twice(layer.mlp)
        return model

    backend = TorchBackend({"tiny": tools.seeded(build)})
    session = backend.open(
        run_id="r", config=tools.config(dp={"max_grad_norm": 1.0}, lora={"target_modules": "all-linear"})
    )
    session.base.module.double()
    batch = tools.batch(3, padded=True)
    expected = clipped_sum(one_by_one(session, batch), range(3), 1.0)
    assert relative_error(tools.run_pass(session, batch).contribution.sum_P, expected) < 1e-9


@pytest.mark.parametrize(
    "lora",
    [
        {"bias": "all"},
        {"bias": "lora_only", "target_modules": "all-linear"},
        {"modules_to_save": ["norm", "down_proj"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("model", ["tiny", "qwen"])
def test_other_trained_parameters_go_by_opacus_samplers(tools, lora, model):
    config = tools.config(model_ref=model, dp={"max_grad_norm": 0.5}, lora=lora)
    session, batch = float64_session(tools, config, model), tools.batch(4, padded=True)
    expected = clipped_sum(one_by_one(session, batch), range(4), 0.5)
    assert relative_error(tools.run_pass(session, batch).contribution.sum_P, expected) < 1e-9


def test_the_whole_model_with_tied_embeddings_is_exact(tools):
    backend = TorchBackend({"tiny": tools.seeded(lambda: tools.tiny_llama(tie_word_embeddings=True))})
    session = backend.open(run_id="r", config=tools.config(dp={"max_grad_norm": 0.5}, lora_config=None))
    session.base.module.double()
    assert session.base.module.lm_head.weight is session.base.module.model.embed_tokens.weight
    batch = tools.batch(3, padded=True)
    expected = clipped_sum(one_by_one(session, batch), range(3), 0.5)
    assert relative_error(tools.run_pass(session, batch).contribution.sum_P, expected) < 1e-9


def test_positions_that_all_records_share_have_no_gradient_of_one_record(tools):
    """GPT-2 looks positions up once for the whole batch."""
    backend = TorchBackend({"gpt2": tools.loaders["gpt2"]})
    with pytest.raises(DPUnsupportedError, match=r"not one per record.*wpe"):
        backend.open(run_id="r", config=tools.config(model_ref="gpt2", dp={}, lora_config=None))


def test_the_backward_pass_never_forms_a_gradient_of_the_base_or_a_sum_over_records(torch_bench, tools):
    session = torch_bench.open(dp={}, lora={"target_modules": "all-linear"})
    tools.run_pass(session, tools.batch(3))
    assert all(p.grad is None for p in session.base.module.parameters())


def test_dropout_on_the_adapter_differs_by_record_and_is_exact_for_the_mask_drawn(tools):
    """With dropout the base is computed apart. The same seed gives the same masks to PEFT's own layers."""
    config = tools.config(dp={"max_grad_norm": 1e3}, lora={"dropout": 0.4})
    session, batch = float64_session(tools, config, micro_batch_tokens=1000), tools.batch(3)
    ids = torch.from_numpy(batch.input_ids)
    with session.recording(3) as rows, session.base.computing(session.adapter, grads=rows):
        session.base.module.train()
        torch.manual_seed(8)
        session.lm.losses(ids, None, ids).mean_B.sum().backward()
    total = rows.columns.flat(rows.matrix_NW.sum(dim=0))
    torch.manual_seed(8)
    with session.base.by_peft(session.adapter):
        loss = record_losses(session.base.module(input_ids=ids, use_cache=False).logits, ids).mean_B.sum()
        theirs = torch.autograd.grad(loss, list(session.parameters.values()))
    session.base.module.eval()
    assert relative_error(total.numpy(), torch.cat([g.reshape(-1) for g in theirs]).numpy()) < 1e-9
    assert not np.allclose(total.numpy(), one_by_one(session, batch).sum(axis=0))


def test_a_variant_of_lora_has_no_rule_of_ours(tools, monkeypatch):
    """No setting asks for DoRA yet; were PEFT to make one, it must not be taken for plain LoRA."""
    monkeypatch.setattr("peft.LoraConfig", functools.partial(peft.LoraConfig, use_dora=True))
    backend = TorchBackend({"tiny": tools.loaders["tiny"]})
    with pytest.raises(DPUnsupportedError, match="lora_magnitude_vector"):
        backend.open(run_id="r", config=tools.config(dp={}))
    session, batch = backend.open(run_id="p", config=tools.config()), tools.batch(2)
    found = tools.run_pass(session, batch).contribution.sum_P
    assert relative_error(found, one_by_one(session, batch).sum(axis=0)) < 1e-5

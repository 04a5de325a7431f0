"""Passes on datums against the plain model: torch's own log_softmax and autograd, one datum at a time, in float64."""

import numpy as np
import pytest
import torch

from tg_tinker.types.losses import Loss
from tg_tinker_server.engine.backend import LossRequest
from tg_tinker_server.engine.loss_fns.closed_form import evaluate
from tg_tinker_server.engine.performance import PerformanceConfig
from tg_tinker_server.engine.torch_backend import TorchBackend

NAMES = ["cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo"]
LENGTHS = (5, 1, 9, 3, 7, 4)


def datums(name, lengths=LENGTHS, *, alternatives=None, seed=0):
    """Random datums, of which some positions are masked."""
    tokens, inputs = [], []
    for i, n in enumerate(lengths):
        rng = np.random.default_rng([seed, i])
        shape = (n,) if alternatives is None else (n, alternatives)
        tokens.append(rng.integers(0, 256, n))
        given = {"target_tokens": rng.integers(0, 256, shape)}
        keep = rng.random(shape) < 0.8
        if name == "cross_entropy":
            given["weights"] = (keep * rng.normal(size=shape)).astype(np.float32)
        else:
            given["advantages"] = (keep * rng.normal(size=shape)).astype(np.float32)
            given["logprobs"] = (-5.5 + rng.normal(size=shape)).astype(np.float32)
        inputs.append(given)
    return tuple(tokens), tuple(inputs)


def request(name, lengths=LENGTHS, *, config=None, alternatives=None, seed=0, index=None, **options):
    tokens, inputs = datums(name, lengths, alternatives=alternatives, seed=seed)
    if index is not None:
        tokens, inputs = tuple(tokens[i] for i in index), tuple(inputs[i] for i in index)
    return LossRequest(tokens=tokens, inputs=inputs, loss=Loss.of(name, config), **options)


def float64_answers(tools, session, asked, model_ref="tiny"):
    """Log-probabilities, losses and gradients [B, P], by transformers and torch alone."""
    plain = TorchBackend({model_ref: tools.loaders[model_ref]})
    other = plain.open(run_id="loop", config=session._config.model_copy(update={"dp_config": None}))
    other.import_state(session.export_state(optimizer=False), optimizer=False)
    model = other.base.module.double()
    logprobs, values, grads = [], [], []
    for tokens, inputs in zip(asked.tokens, asked.inputs, strict=True):
        logits = model(input_ids=torch.from_numpy(tokens)[None], use_cache=False).logits[0]
        targets = torch.from_numpy(inputs["target_tokens"])
        lp = torch.log_softmax(logits, dim=-1).gather(1, targets.reshape(len(tokens), -1)).reshape(targets.shape)
        by_hand = evaluate(asked.loss, lp.detach().numpy(), inputs, train=True)
        parts = torch.autograd.grad(lp, list(other.parameters.values()), torch.from_numpy(by_hand.slope))
        logprobs.append(lp.detach().numpy())
        values.append(by_hand.value)
        grads.append(torch.cat([g.reshape(-1) for g in parts]).numpy())
    other.close()
    return logprobs, values, np.stack(grads)


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("name", NAMES)
def test_loss_logprobs_and_gradient_are_those_of_the_plain_model(torch_bench, tools, name):
    session = torch_bench.open()
    asked = request(name)
    found = session.forward_backward(asked)
    logprobs, values, grads_BP = float64_answers(tools, session, asked)
    assert found.loss == found.loss_sum == pytest.approx(sum(values), rel=1e-5)
    for own, expected in zip(found.logprobs, logprobs, strict=True):
        assert own.dtype == np.float32
        np.testing.assert_allclose(own, expected, atol=1e-5)
    assert relative_error(found.contribution.sum_P, grads_BP.sum(axis=0)) < 1e-5
    assert (found.num_records, found.num_tokens, found.num_targets) == (6, sum(LENGTHS), sum(LENGTHS))


@pytest.mark.parametrize("name", NAMES)
def test_the_clipped_sum_is_that_of_a_loop_over_units(torch_bench, tools, name):
    units = list("abacba")
    session = torch_bench.open(dp={"max_grad_norm": 0.5})
    asked = request(name, units=tuple(units))
    found = session.forward_backward(asked)
    _, _, grads_BP = float64_answers(tools, session, asked)
    total, norms = 0.0, []
    for unit in "abc":
        own = sum(g for g, u in zip(grads_BP, units, strict=True) if u == unit)
        norms.append(np.linalg.norm(own))
        total = total + own * min(1.0, 0.5 / norms[-1])
    assert relative_error(found.contribution.sum_P, total) < 1e-5
    np.testing.assert_allclose(np.sort(found.contribution.norms_U), np.sort(norms), rtol=1e-5)


@pytest.mark.parametrize("model", ["tiny", "qwen", "gpt2", "opt"])
def test_several_alternatives_of_a_position_and_other_models(torch_bench, tools, model):
    target = {"gpt2": ["c_attn"], "opt": ["q_proj"]}.get(model, "all-linear")
    session = torch_bench.open(model_ref=model, lora={"target_modules": target})
    asked = request("cross_entropy", alternatives=3)
    found = session.forward_backward(asked)
    logprobs, values, grads_BP = float64_answers(tools, session, asked, model)
    assert found.loss == pytest.approx(sum(values), rel=1e-4)
    for own, expected in zip(found.logprobs, logprobs, strict=True):
        np.testing.assert_allclose(own, expected, atol=2e-5)
    assert relative_error(found.contribution.sum_P, grads_BP.sum(axis=0)) < 1e-4


def test_a_trained_head_goes_through_all_logits(torch_bench, tools):
    session = torch_bench.open(lora={"target_modules": ["lm_head", "q_proj"]})
    asked = request("cross_entropy", alternatives=2)
    found = session.forward_backward(asked)
    _, _, grads_BP = float64_answers(tools, session, asked)
    assert relative_error(found.contribution.sum_P, grads_BP.sum(axis=0)) < 1e-5


@pytest.mark.parametrize("dp", [None, {"max_grad_norm": 0.1}])
def test_the_size_of_micro_batches_changes_nothing_beyond_rounding(tools, dp):
    found = []
    for tokens in (1, 12, 10_000):
        backend = TorchBackend({"tiny": tools.loaders["tiny"]}, PerformanceConfig(micro_batch_tokens=tokens))
        session = backend.open(run_id="r", config=tools.config(dp=dp))
        found.append(session.forward_backward(request("ppo", units=tuple("aabbca") if dp else None)))
    for other in found[1:]:
        assert relative_error(other.contribution.sum_P, found[0].contribution.sum_P) < 1e-5
        for own, expected in zip(other.logprobs, found[0].logprobs, strict=True):
            np.testing.assert_allclose(own, expected, atol=1e-5)

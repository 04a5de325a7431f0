"""Passes on datums against the plain model: torch's own log_softmax and autograd, one datum at a time, in float64."""

import numpy as np
import pytest
import torch

from tg_tinker.types.losses import LOSSES
from tg_tinker_server.engine.backend import PassRequest
from tg_tinker_server.engine.loss_fns.closed_form import evaluate
from tg_tinker_server.engine.performance import PerformanceConfig
from tg_tinker_server.engine.torch_backend import TorchBackend

NAMES = list(LOSSES)


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
def test_loss_logprobs_and_gradient_are_those_of_the_plain_model(torch_bench, tools, data, name):
    session = torch_bench.open()
    asked = data.request(name)
    found = session.forward_backward(asked)
    logprobs, values, grads_BP = float64_answers(tools, session, asked)
    assert found.loss == found.loss_sum == pytest.approx(sum(values), rel=1e-5)
    for own, expected in zip(found.logprobs, logprobs, strict=True):
        assert own.dtype == np.float32
        np.testing.assert_allclose(own, expected, atol=1e-5)
    assert relative_error(found.contribution.sum_P, grads_BP.sum(axis=0)) < 1e-5
    assert (found.num_records, found.num_tokens, found.num_targets) == (6, sum(data.lengths), sum(data.lengths))


@pytest.mark.parametrize("name", NAMES)
def test_the_clipped_sum_is_that_of_a_loop_over_units(torch_bench, tools, data, name):
    units = list("abacba")
    session = torch_bench.open(dp={"max_grad_norm": 0.5})
    asked = data.request(name, units=tuple(units))
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
def test_several_alternatives_of_a_position_and_other_models(torch_bench, tools, data, model):
    target = {"gpt2": ["c_attn"], "opt": ["q_proj"]}.get(model, "all-linear")
    session = torch_bench.open(model_ref=model, lora={"target_modules": target})
    asked = data.request("cross_entropy", alternatives=3)
    found = session.forward_backward(asked)
    logprobs, values, grads_BP = float64_answers(tools, session, asked, model)
    assert found.loss == pytest.approx(sum(values), rel=1e-4)
    for own, expected in zip(found.logprobs, logprobs, strict=True):
        np.testing.assert_allclose(own, expected, atol=2e-5)
    assert relative_error(found.contribution.sum_P, grads_BP.sum(axis=0)) < 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        {"lora": {"target_modules": ["lm_head", "q_proj"]}},
        {"lora_config": None, "randomise": False},
        {"gradient_checkpointing": True},
    ],
    ids=["adapter on the head", "every parameter", "activations computed again"],
)
@pytest.mark.parametrize("bound", [None, 0.5])
def test_ways_through_all_logits_and_checkpoints_give_the_same(torch_bench, tools, data, settings, bound):
    session = torch_bench.open(dp=None if bound is None else {"max_grad_norm": bound}, **settings)
    asked = data.request("cross_entropy", alternatives=2)
    found = session.forward_backward(asked)
    _, _, grads_BP = float64_answers(tools, session, asked)
    factors = [1.0 if bound is None else min(1.0, bound / max(np.linalg.norm(g), 1e-9)) for g in grads_BP]
    assert relative_error(found.contribution.sum_P, np.array(factors) @ grads_BP) < 1e-5


@pytest.mark.parametrize("dp", [None, {"max_grad_norm": 0.1}])
def test_the_size_of_micro_batches_changes_nothing_beyond_rounding(tools, data, dp):
    found = []
    for tokens in (1, 12, 10_000):
        backend = TorchBackend({"tiny": tools.loaders["tiny"]}, PerformanceConfig(micro_batch_tokens=tokens))
        session = backend.open(run_id="r", config=tools.config(dp=dp))
        found.append(session.forward_backward(data.request("ppo", units=tuple("aabbca") if dp else None)))
    for other in found[1:]:
        assert relative_error(other.contribution.sum_P, found[0].contribution.sum_P) < 1e-5
        for own, expected in zip(other.logprobs, found[0].logprobs, strict=True):
            np.testing.assert_allclose(own, expected, atol=1e-5)


@pytest.mark.parametrize("dp", [None, {"max_grad_norm": 0.1}])
def test_who_is_in_the_batch_and_how_long_they_are_changes_no_log_probability(torch_bench, data, dp):
    session = torch_bench.open(dp=dp)
    together = session.forward_backward(data.request("dro"))
    for i in range(len(data.lengths)):
        alone = session.forward_backward(data.request("dro", index=[i]))
        np.testing.assert_allclose(alone.logprobs[0], together.logprobs[i], atol=1e-6)


def test_a_unit_too_large_for_one_slice_is_summed_before_its_one_clip(tools, data):
    whole, cut = (
        TorchBackend({"tiny": tools.loaders["tiny"]}, PerformanceConfig(micro_batch_tokens=tokens)).open(
            run_id="r", config=tools.config(dp={"max_grad_norm": 0.2})
        )
        for tokens in (10_000, 16)
    )
    asked = data.request("importance_sampling", units=("a",) * 6)
    work = cut.start(asked)
    slices = 0
    while not work.finished:
        work.advance()
        slices += 1
    assert slices >= 6
    found, expected = work.result().contribution, whole.forward_backward(asked).contribution
    assert found.units == ("a",)
    assert relative_error(found.sum_P, expected.sum_P) < 1e-5
    assert np.linalg.norm(found.sum_P) == pytest.approx(0.2, rel=1e-4)


@pytest.mark.parametrize("dp", [None, {"max_grad_norm": 0.1}])
def test_passes_of_two_runs_on_datums_share_a_slice_and_get_what_each_gets_alone(tools, data, dp):
    backend = TorchBackend({"tiny": tools.loaders["tiny"]}, PerformanceConfig(micro_batch_tokens=400))
    sessions = [backend.open(run_id=str(i), config=tools.config(dp=dp)) for i in range(2)]
    asked = [data.request("cross_entropy", (5, 6), alternatives=2), data.request("cispo", (5, 7), of=1)]
    alone = [s.forward_backward(r) for s, r in zip(sessions, asked, strict=True)]
    first, second = (s.start(r) for s, r in zip(sessions, asked, strict=True))
    assert first.advance([second]) == [second]
    for work, expected in zip((first, second), alone, strict=True):
        found = work.result()
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert relative_error(found.contribution.sum_P, expected.contribution.sum_P) < 1e-4
        assert [lp.shape for lp in found.logprobs] == [lp.shape for lp in expected.logprobs]


def test_a_pass_on_datums_and_one_on_a_batch_do_not_share_a_slice(tools, data):
    backend = TorchBackend({"tiny": tools.loaders["tiny"]}, PerformanceConfig(micro_batch_tokens=400))
    first, second = (backend.open(run_id=str(i), config=tools.config()) for i in range(2))
    batch, datums = second.start(PassRequest.of_batch(tools.batch(2))), first.start(data.request("ppo"))
    assert datums.share_key != batch.share_key
    assert datums.advance([batch]) == []
    assert first.share_key is not None, "nothing failed, so it is not left alone from now on"


def test_a_datum_that_is_not_finite_leaves_the_rows_of_others_alone(torch_bench, data):
    session = torch_bench.open(dp={"max_grad_norm": 0.1})
    asked = data.request("importance_sampling", (6, 6, 6))
    clean = session.forward_backward(data.request("importance_sampling", (6, 6, 6), index=[0, 2]))
    asked.inputs[1]["logprobs"][:] = -np.inf
    found = session.forward_backward(asked)
    assert np.isnan(found.contribution.norms_U).sum() + np.isinf(found.contribution.norms_U).sum() == 1
    assert relative_error(found.contribution.sum_P, clean.contribution.sum_P) < 1e-6


def test_a_bfloat16_base_and_a_loss_scale_give_the_same_up_to_rounding(tools, data):
    exact, half = (
        TorchBackend({"tiny": tools.loaders["tiny"]}, PerformanceConfig(base_dtype=dtype)).open(
            run_id="r", config=tools.config(mixed_precision="bf16", loss_scale=64.0)
        )
        for dtype in ("float32", "bfloat16")
    )
    assert (exact.base_dtype, half.base_dtype) == ("float32", "bfloat16")
    asked = data.request("cross_entropy", alternatives=2)
    found, expected = (s.forward_backward(asked) for s in (half, exact))
    assert relative_error(found.contribution.sum_P, expected.contribution.sum_P) < 0.1
    assert found.loss == pytest.approx(expected.loss, abs=0.5)


@pytest.mark.parametrize("name", ["ppo", "gspo", "custom"])
def test_no_neighbour_decides_how_a_private_loss_that_jumps_is_rounded(tools, data, name):
    """A near tie between clipped and not would else go the other way when one unit more is there."""
    backend = TorchBackend({"tiny": tools.loaders["tiny"]}, PerformanceConfig(micro_batch_tokens=4000))
    first, second = (
        backend.open(run_id=str(i), config=tools.config(dp={"max_grad_norm": 0.1, "merge_units": True})) for i in "ab"
    )
    units = ("a", "b", "a", "c", "b", "d")
    asked = data.request(name, (7,) * 6, units=units)
    work = first.start(asked)
    assert work.share_key is None
    assert work.advance([second.start(asked)]) == []
    while not work.finished:
        work.advance()
    found = work.result()
    for unit in "abcd":
        index = [i for i, u in enumerate(units) if u == unit]
        alone = first.forward_backward(data.request(name, (7,) * 6, index=index, units=(unit,) * len(index)))
        (own,) = alone.contribution.grads_UP
        np.testing.assert_array_equal(found.contribution.grads_UP[found.contribution.units.index(unit)], own)
        for i, lp in zip(index, alone.logprobs, strict=True):
            np.testing.assert_array_equal(found.logprobs[i], lp)

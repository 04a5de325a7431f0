"""Steps with Adam's settings of their own against torch.optim.AdamW, which is told the same before each step."""

import numpy as np
import pytest
import torch

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types.optim import AdamParams

STEPS = (
    AdamParams(learning_rate=0.01),
    AdamParams(learning_rate=0.03, beta1=0.5, beta2=0.8, eps=1e-4, weight_decay=0.1),
    None,  # as the run is configured
    AdamParams(learning_rate=0.01, beta1=0.0, beta2=0.999, eps=1e-8, weight_decay=0.01),
)


def reference(session, weights_P, grads, config):
    """torch's AdamW in float64 on the same gradients."""
    parameter = torch.nn.Parameter(torch.from_numpy(weights_P.astype(np.float64)))
    optimizer = torch.optim.AdamW([parameter], lr=1.0)
    for adam, grad_P in zip(STEPS, grads, strict=True):
        if adam is None:
            settings = {"lr": 0.02, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
        else:
            settings = {
                "lr": adam.learning_rate,
                "betas": (adam.beta1, adam.beta2),
                "eps": adam.eps,
                "weight_decay": adam.weight_decay,
            }
        optimizer.param_groups[0].update(settings)
        parameter.grad = torch.from_numpy(grad_P.astype(np.float64))
        optimizer.step()
    return parameter.detach().numpy()


def test_every_step_is_adamw_with_the_settings_of_that_step_on_one_state(any_bench, tools):
    session = any_bench.open(optimizer={"name": "adamw", "betas": (0.9, 0.99), "weight_decay": 0.05})
    before, grads = tools.flat_weights(session), []
    for i, adam in enumerate(STEPS):
        contribution = tools.accumulate(session, tools.batch(3, seed=i)).contribution
        grads.append((contribution.sum_P / 3).astype(np.float32))
        tools.step(session, 0.02 if adam is None else adam.learning_rate, adam=adam)
    expected = reference(session, before, grads, session._config.optimizer)
    np.testing.assert_allclose(tools.flat_weights(session), expected, atol=1e-6)


def test_decay_is_decoupled_in_a_run_of_plain_adam_too_but_only_for_that_step(any_bench, tools):
    moved = []
    for name in ("adam", "adamw"):
        session = any_bench.open(optimizer={"name": name})
        for i in range(2):
            tools.accumulate(session, tools.batch(3, seed=i))
            tools.step(session, 0.01, adam=AdamParams(weight_decay=0.5))
        moved.append(tools.flat_weights(session))
    np.testing.assert_array_equal(*moved)
    coupled, decoupled = (any_bench.open(optimizer={"name": name, "weight_decay": 0.5}) for name in ("adam", "adamw"))
    for session in (coupled, decoupled):
        for adam in (AdamParams(weight_decay=0.5), None):
            tools.accumulate(session, tools.batch(3))
            tools.step(session, 0.01, adam=adam)
    assert not np.allclose(tools.flat_weights(coupled), tools.flat_weights(decoupled), atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adafactor"])
def test_other_optimizers_refuse_it_and_keep_what_is_pending(any_bench, tools, name):
    session = any_bench.open(optimizer={"name": name})
    tools.accumulate(session, tools.batch(2))
    before = tools.weights_of(session)
    with pytest.raises(InvalidRequestError, match=name) as e:
        tools.step(session, adam=AdamParams())
    assert e.value.field == "adam_params"
    assert session.pending_calls == 1
    assert tools.weights_of(session) == before


def test_the_global_clip_acts_on_the_noised_mean(any_bench, tools):
    clip = 1e-3
    session = any_bench.open(dp={"max_grad_norm": 1.0}, optimizer={"name": "adamw"}, batch_size=1)
    tools.accumulate(session, tools.batch(2))
    plain = AdamParams(learning_rate=1.0, beta1=0.0, beta2=0.0, eps=1e3)  # a step of grad / eps, where that is small
    before = tools.flat_weights(session)
    result = tools.step(session, 1.0, adam=plain, global_clip=clip, mechanism=tools.mechanism(5.0, 1.0))
    assert result.grad_norm > clip, "the noise is in the norm"
    moved = np.linalg.norm((tools.flat_weights(session) - before).astype(np.float64))
    assert moved <= clip / 1e3 * 1.05

"""The NumPy optimizers against torch's own."""

import numpy as np
import pytest
import torch
from torch import nn

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import OptimizerConfig
from tg_tinker_server.engine import numpy_optimizers, optimizers

CASES = {
    "adamw": {"name": "adamw", "weight_decay": 0.1},
    "adamw without decay": {"name": "adamw", "betas": (0.8, 0.95), "eps": 1e-3},
    "adam with decay in the gradient": {"name": "adam", "weight_decay": 0.1},
    "sgd": {"name": "sgd", "momentum": 0.0},
    "sgd with momentum": {"name": "sgd", "momentum": 0.9, "nesterov": False, "weight_decay": 0.01},
    "sgd with nesterov": {"name": "sgd", "momentum": 0.9, "nesterov": True},
    "adafactor": {"name": "adafactor", "weight_decay": 0.1},
}


@pytest.mark.parametrize("shape", [(4, 3), (12,)])
@pytest.mark.parametrize("case", CASES)
def test_both_libraries_take_the_same_steps(case, shape):
    config = OptimizerConfig(**CASES[case])
    rng = np.random.default_rng(0)
    ours = rng.normal(size=shape).astype(np.float32)
    theirs = nn.Parameter(torch.from_numpy(ours.copy()))
    optimizer = optimizers.make_optimizer(config, [theirs])
    state = {}
    for step in range(6):
        grad = rng.normal(size=shape).astype(np.float32)
        rate = 0.1 / (step + 1)
        ours, state = numpy_optimizers.update(config, ours, grad, state, learning_rate=rate)
        theirs.grad = torch.from_numpy(grad)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("case", CASES)
def test_an_update_changes_none_of_its_inputs(case):
    config = OptimizerConfig(**CASES[case])
    param, grad = np.ones((3, 3), dtype=np.float32), np.full((3, 3), 0.5, dtype=np.float32)
    _, state = numpy_optimizers.update(config, param, grad, {}, learning_rate=0.1)
    kept = {k: v.copy() for k, v in state.items()}
    numpy_optimizers.update(config, param, grad, state, learning_rate=0.1)
    assert (param == 1).all()
    assert (grad == 0.5).all()
    assert all(np.array_equal(state[k], kept[k]) for k in kept)


def test_an_unknown_name_is_refused_listing_those_that_exist():
    config = OptimizerConfig().model_copy(update={"name": "lion"})
    with pytest.raises(InvalidRequestError, match="adafactor"):
        optimizers.make_optimizer(config, [nn.Parameter(torch.zeros(1))])
    with pytest.raises(InvalidRequestError, match="adafactor"):
        numpy_optimizers.update(config, np.zeros(1), np.zeros(1), {}, learning_rate=0.1)

"""The losses by hand: against the published figures, and against differences of their own values."""

import numpy as np
import pytest

from tg_tinker.types.losses import Loss
from tg_tinker_server.engine.loss_fns import closed_form

LP = np.array([-0.5, -1.0, -2.0])
RL = {
    "target_tokens": np.array([1, 2, 3]),
    "logprobs": np.float32([-0.7, -0.7, -0.7]),
    "advantages": np.float32([1, -1, 2]),
}
GOLDEN = [
    ("cross_entropy", {}, 3.0, [0, -1, -1]),
    ("importance_sampling", {}, -1.025648, None),
    ("ppo", {}, -0.945064, [0, 0, -0.545064]),
    ("cispo", {}, 3.0, [-1.2, 0.8, -1.6]),
    ("cispo", {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}, 0.960010, None),
    ("dro", {"beta": 0.05}, 3.5455, [-0.99, 0.985, -2.065]),
    ("dro", {"beta": 0.01}, 3.5091, None),
]


def evaluate(name, lp, inputs, config=None):
    return closed_form.evaluate(Loss.of(name, config), lp, inputs, train=True)


@pytest.mark.parametrize(("name", "config", "value", "slope"), GOLDEN)
def test_values_and_slopes_are_the_published_ones(name, config, value, slope):
    inputs = RL | {"weights": np.float32([0, 1, 1])}
    found = evaluate(name, LP, inputs, config)
    assert found.value == pytest.approx(value, abs=1e-6)
    if slope is not None:
        np.testing.assert_allclose(found.slope, slope, atol=1e-6)


def test_gspo_has_one_ratio_for_a_sequence_and_the_gradient_of_each_token():
    mask = np.float32([0, 1, 1])
    ratio = np.exp(np.mean((LP - RL["logprobs"])[1:]))  # 0.449, below the range
    found = evaluate("gspo", LP, RL | {"sequence_ratio_mask": mask})
    assert found.value == pytest.approx(-(ratio * 1 + 0.8 * -1 + ratio * 2), abs=1e-6)
    np.testing.assert_allclose(found.slope, [-ratio, 0, -2 * ratio], atol=1e-6)

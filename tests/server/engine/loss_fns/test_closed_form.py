"""The losses by hand against the published figures and against torch's formulas, differentiated by torch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tg_tinker.types.losses import LOSSES, Loss
from tg_tinker_server.engine.loss_fns import autograd, closed_form

BOTH = [closed_form, autograd]
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


@pytest.mark.parametrize("how", BOTH)
@pytest.mark.parametrize(("name", "config", "value", "slope"), GOLDEN)
def test_values_and_slopes_are_the_published_ones(how, name, config, value, slope):
    inputs = RL | {"weights": np.float32([0, 1, 1])}
    found = how.evaluate(Loss.of(name, config), LP, inputs, train=True)
    assert found.value == pytest.approx(value, abs=1e-6)
    if slope is not None:
        np.testing.assert_allclose(found.slope, slope, atol=1e-6)


@pytest.mark.parametrize("how", BOTH)
def test_gspo_has_one_ratio_for_a_sequence_and_the_gradient_of_each_token(how):
    mask = np.float32([0, 1, 1])
    ratio = np.exp(np.mean((LP - RL["logprobs"])[1:]))  # 0.449, below the range
    found = how.evaluate(Loss.of("gspo"), LP, RL | {"sequence_ratio_mask": mask}, train=True)
    assert found.value == pytest.approx(-(ratio * 1 + 0.8 * -1 + ratio * 2), abs=1e-6)
    np.testing.assert_allclose(found.slope, [-ratio, 0, -2 * ratio], atol=1e-6)


def random_inputs(name, rng, n, *, per_token, mask):
    keep = rng.random(n) < 0.7
    if name == "cross_entropy":
        return {"weights": (keep * rng.normal(size=n)).astype(np.float32)}
    inputs = {
        "advantages": (keep * rng.normal(size=n)).astype(np.float32),
        "logprobs": (-1 + 0.3 * rng.normal(size=n)).astype(np.float32),
    }
    if per_token:
        inputs["clip_low_threshold"] = rng.uniform(0.5, 1.0, n).astype(np.float32)
        inputs["clip_high_threshold"] = rng.uniform(1.0, 1.5, n).astype(np.float32)
    if mask:
        inputs["sequence_ratio_mask"] = (rng.random(n) < 0.5).astype(np.float32)
    return inputs


@given(
    name=st.sampled_from(list(LOSSES)), n=st.integers(1, 8), per_token=st.booleans(), mask=st.booleans(),
    seed=st.integers(0, 10_000),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_both_give_the_same_value_and_slope(name, n, per_token, mask, seed):
    rng = np.random.default_rng(seed)
    lp, inputs = -1 + 0.3 * rng.normal(size=n), random_inputs(name, rng, n, per_token=per_token, mask=mask)
    by_hand, by_torch = (how.evaluate(Loss.of(name), lp, inputs, train=True) for how in BOTH)
    assert by_hand.value == pytest.approx(by_torch.value, abs=1e-9)
    np.testing.assert_allclose(by_hand.slope, by_torch.slope, atol=1e-9)


@pytest.mark.parametrize("name", ["cross_entropy", "importance_sampling", "ppo", "dro"])
def test_slopes_are_differences_of_values(name):
    rng = np.random.default_rng(4)
    lp, inputs = -1 + 0.3 * rng.normal(size=6), random_inputs(name, rng, 6, per_token=True, mask=False)
    found, h = closed_form.evaluate(Loss.of(name), lp, inputs, train=True), 1e-6
    for i in range(6):
        moved = [
            closed_form.evaluate(Loss.of(name), lp + s * h * np.eye(6)[i], inputs, train=False).value for s in (1, -1)
        ]
        assert found.slope[i] == pytest.approx((moved[0] - moved[1]) / (2 * h), abs=1e-6)


@pytest.mark.parametrize("how", BOTH)
@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("bad", [-np.inf, np.inf, np.nan])
def test_a_masked_position_adds_exactly_zero_whatever_its_log_probabilities_are(how, name, bad):
    inputs = {
        "weights": np.float32([1, 0, 1]), "advantages": np.float32([1, 0, -1]), "logprobs": np.float32([-1, bad, -1])
    }  # fmt: skip
    lp = np.array([-1.1, bad, -0.9])
    found = how.evaluate(Loss.of(name), lp, inputs, train=True)
    kept = {key: value[[0, 2]] for key, value in inputs.items()}
    expected = how.evaluate(Loss.of(name), lp[[0, 2]], kept, train=True)
    assert found.value == expected.value
    assert found.slope.tolist() == [expected.slope[0], 0.0, expected.slope[1]]


@pytest.mark.parametrize("how", BOTH)
def test_a_threshold_of_a_position_goes_before_that_of_the_configuration(how):
    inputs = RL | {"clip_high_threshold": np.float32([9, 9, 9])}
    found = how.evaluate(Loss.of("ppo"), LP, inputs, train=True)
    assert found.slope[0] == pytest.approx(-np.exp(0.2)), "1.22 is within 9 and was not within 1.2"


@pytest.mark.parametrize("how", BOTH)
def test_weights_of_several_alternatives_have_a_slope_each(how):
    weights = np.float32([[0.5, 0.25, 0], [0, -1, 0]])
    lp = np.array([[-1.0, -2.0, -np.inf], [-3.0, -0.5, -1.0]])
    found = how.evaluate(Loss.of("cross_entropy"), lp, {"weights": weights}, train=True)
    assert found.value == pytest.approx(0.5 + 0.5 - 0.5)
    np.testing.assert_array_equal(found.slope, -weights)


@pytest.mark.parametrize("how", BOTH)
def test_an_infinite_ratio_shows_in_the_value(how):
    inputs = RL | {"logprobs": np.float32([-np.inf, -1, -1])}
    assert not np.isfinite(how.evaluate(Loss.of("importance_sampling"), LP, inputs, train=True).value)
    assert how.evaluate(Loss.of("dro"), LP, RL, train=False).slope is None

import math

import numpy as np
import pytest
import torch

from tg_tinker.custom.linear import LossGradientError, Options, forward_data, linearize, per_datum_loss
from tg_tinker.errors import DPUnsupportedError, InvalidRequestError
from tg_tinker.regularizers import L1, RegularizerSpec
from tg_tinker.types.datum import Datum, ModelInput

LOGPROBS = [np.float32([-0.5, -1.0]), np.float32([-2.0, -0.25, -3.0])]


def datum(n, **inputs):
    return Datum(ModelInput.from_ints(range(n)), {"target_tokens": list(range(n)), **inputs})


DATA = [
    datum(2, advantages=[1.0, -1.0], mask=np.float32([1, 0])),
    datum(3, advantages=[2.0, 0.5, 1.0], mask=np.float32([0, 1, 1])),
]


def squares(data, logprobs):
    return sum((x**2).sum() for x in logprobs), {"seen": len(data), "n:sum": float(len(data))}


def spread(data, logprobs):
    return torch.cat(logprobs).var(correction=0), {"spread:max": 1.0}


def weights(linear):
    return [d.loss_fn_inputs["weights"].to_numpy() for d in linear.data]


def test_weights_are_minus_the_gradient():
    found = linearize(DATA, LOGPROBS, squares, Options())
    for w, x in zip(weights(found), LOGPROBS, strict=True):
        np.testing.assert_allclose(w, -2 * x, rtol=1e-6)
    assert found.output.loss_total == pytest.approx(sum((x**2).sum() for x in LOGPROBS))
    assert found.metrics == {"seen": 2, "n:sum": 2.0}
    assert set(found.data[0].loss_fn_inputs) == {"target_tokens", "weights"}


def test_regularizers_change_the_weights_by_their_gradient():
    spec = RegularizerSpec(fn=L1(), weight=0.1, name="l1")
    plain, more = (linearize(DATA, LOGPROBS, squares, Options(regularizers=r)) for r in ((), (spec,)))
    for w, v, x in zip(weights(plain), weights(more), LOGPROBS, strict=True):
        np.testing.assert_allclose(v - w, -0.1 * np.sign(x), rtol=1e-5)
    assert more.output.loss_total - plain.output.loss_total == pytest.approx(0.1 * 6.75)


def test_units_are_evaluated_alone():
    """The gradient of a unit does not change with the data of another."""
    alone = linearize(DATA, LOGPROBS, spread, Options(), units=["a", "b"])
    for i in (0, 1):
        single = linearize([DATA[i]], [LOGPROBS[i]], spread, Options())
        np.testing.assert_array_equal(weights(alone)[i], weights(single)[0])
    together = linearize(DATA, LOGPROBS, spread, Options())
    assert not np.allclose(weights(alone)[0], weights(together)[0])
    np.testing.assert_array_equal(
        weights(linearize(DATA, LOGPROBS, spread, Options(), units=["a", "a"]))[0], weights(together)[0]
    )
    assert alone.output.loss_total == pytest.approx(sum(x.var() for x in LOGPROBS), rel=1e-5)


def test_metrics_of_units_are_reduced_by_their_names():
    def loss(data, logprobs):
        n = float(sum(len(x) for x in logprobs))
        return sum(x.sum() for x in logprobs), {"plain": n, "n:sum": n, "n:max": n, "text": "left out"}

    found = linearize(DATA, LOGPROBS, loss, Options(), units=["a", "b"])
    assert found.metrics == {"plain": 2.5, "n:sum": 5.0, "n:max": 3.0}
    with pytest.raises(InvalidRequestError, match="name:reducer"):
        linearize(DATA, LOGPROBS, lambda d, x: (x[0].sum(), {"a:b:c": 1.0}), Options(), units=["a", "b"])


def per_datum(logprobs, advantages, mask):
    ratio = (logprobs * advantages * mask).sum()
    return ratio.square(), {"ratio:sum": ratio, "ratio:mean": ratio.detach()}


def test_the_form_of_one_datum_is_the_sum_of_separate_calls():
    found = linearize(DATA, LOGPROBS, per_datum_loss(per_datum), Options())
    parts = [linearize([d], [x], per_datum_loss(per_datum), Options()) for d, x in zip(DATA, LOGPROBS, strict=True)]
    for w, part in zip(weights(found), parts, strict=True):
        np.testing.assert_array_equal(w, weights(part)[0])
    assert found.output.loss_total == pytest.approx(sum(p.output.loss_total for p in parts))
    ratios = [p.metrics["ratio:sum"] for p in parts]
    assert found.metrics == {"ratio:sum": pytest.approx(sum(ratios)), "ratio:mean": pytest.approx(np.mean(ratios))}


def test_it_may_take_every_input():
    seen = []
    linearize(DATA, LOGPROBS, per_datum_loss(lambda lp, **kw: (lp.sum(), seen.append(sorted(kw)) or {})), Options())
    assert seen == [["advantages", "mask", "target_tokens"]] * 2


def test_inputs_that_are_missing_and_metrics_without_reducer_are_named():
    with pytest.raises(InvalidRequestError, match="'rewards'"):
        linearize(DATA, LOGPROBS, per_datum_loss(lambda lp, rewards: (lp.sum(), {})), Options())
    with pytest.raises(InvalidRequestError, match="name:reducer"):
        linearize(DATA, LOGPROBS, per_datum_loss(lambda lp: (lp.sum(), {"bare": 1.0})), Options())


@pytest.mark.parametrize(
    "loss",
    [
        lambda d, x: (x[0].sum(), {}),
        lambda d, x: (torch.tensor(1.0), {}),
        lambda d, x: (sum((y * math.inf).sum() for y in x), {}),
        lambda d, x: (sum(y.detach().sum() for y in x), {}),
    ],
)
def test_no_gradient_is_a_value_error(loss):
    with pytest.raises(LossGradientError) as caught:
        linearize(DATA, LOGPROBS, loss, Options())
    assert isinstance(caught.value, ValueError)


def test_log_probabilities_that_the_server_keeps_are_no_base_for_a_loss():
    with pytest.raises(DPUnsupportedError, match="diagnostics") as caught:
        linearize(DATA[:1], [np.float32([np.nan, np.nan])], squares, Options())
    assert "create_custom_loss" in caught.value.alternative


def test_two_dimensions_keep_their_shape():
    d = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [[1, 2, 3], [4, 5, 6]]})
    assert forward_data([d])[0].loss_fn_inputs["weights"].shape == [2, 3]
    found = linearize([d], [np.full((2, 3), -1.0, np.float32)], squares, Options())
    np.testing.assert_array_equal(weights(found)[0], np.full((2, 3), 2.0))


def test_targets_are_needed():
    with pytest.raises(InvalidRequestError, match="target_tokens"):
        forward_data([Datum(ModelInput.from_ints([1]), {"weights": [1]})])

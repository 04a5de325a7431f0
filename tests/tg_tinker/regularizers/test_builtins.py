import math

import pytest
import torch

from tg_tinker.errors import InvalidRequestError
from tg_tinker.regularizers import KL, L1, L2, Consistency, ElasticNet, Entropy, GradientPenalty, Orthogonality
from tg_tinker.types.datum import Datum, ModelInput

X = [1.0, -2.0, 3.0]


def value(regularizer, *rows, data=()):
    leaves = [torch.tensor(r, dtype=torch.float64, requires_grad=True) for r in rows]
    return float(regularizer(data, leaves)[0].detach())


def checked(regularizer, *rows, data=()):
    """The value, after its gradient was held to finite differences."""
    leaves = [torch.tensor(r, dtype=torch.float64, requires_grad=True) for r in rows]
    assert torch.autograd.gradcheck(lambda *xs: regularizer(data, list(xs))[0], leaves)
    return float(regularizer(data, leaves)[0].detach())


@pytest.mark.parametrize(("regularizer", "expected"), [(L1(), 6.0), (L2(), 14.0), (ElasticNet(), 10.0)])
def test_norms_of_one_row(regularizer, expected):
    assert checked(regularizer, X) == pytest.approx(expected)


def test_norms_have_their_settings():
    assert value(L1(lambda_=0.5, reduction="mean"), X) == pytest.approx(1.0)
    assert value(L1("probs"), [math.log(0.25), math.log(0.5)]) == pytest.approx(0.75)
    assert value(L2(center="mean"), X) == pytest.approx(sum((x - 2 / 3) ** 2 for x in X))
    assert value(L2(center=1.0), X) == pytest.approx(0 + 9 + 4)
    assert value(L2(clip=2.0), X) == pytest.approx(1 + 4 + 4)
    assert value(ElasticNet(l1_ratio=1.0), X) == pytest.approx(6.0)
    assert value(L1(), [1.0], [2.0, 3.0]) == pytest.approx(6.0)
    datum = Datum(ModelInput.from_ints([1, 2]), {"weights": [3, -4]})
    assert value(L1("field", field="weights"), [0.0, 0.0], data=[datum]) == pytest.approx(7.0)


def test_entropy_of_a_uniform_distribution():
    uniform = [math.log(0.25)] * 4
    assert checked(Entropy(), uniform) == pytest.approx(-1.386294, abs=1e-6)
    assert value(Entropy("minimize"), uniform) == pytest.approx(1.386294, abs=1e-6)
    assert value(Entropy("minimize", normalize=True), uniform) == pytest.approx(1.0)
    assert value(Entropy("minimize", "sum"), [uniform, uniform]) == pytest.approx(2 * math.log(4))


def test_temperature_normalises_again():
    logits = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64).log_softmax(-1)
    warmer = (logits / 2).softmax(-1)
    expected = -(warmer * warmer.log()).sum().item()
    assert value(Entropy("minimize", temperature=2.0), logits.tolist()) == pytest.approx(expected)


P, Q = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)], [math.log(0.25)] * 4


def test_kl_has_the_value_of_the_formula_and_a_gradient():
    reference = [torch.tensor(Q)]
    assert checked(KL(reference), P) == pytest.approx(0.106440, abs=1e-6)
    expected = sum(0.25 * (math.log(0.25) - p) for p in P)
    assert checked(KL(reference, "reverse"), P) == pytest.approx(expected, abs=1e-6)
    assert value(KL(reference, "symmetric"), P) == pytest.approx((0.106440 + expected) / 2, abs=1e-6)
    leaf = torch.tensor(P, requires_grad=True)
    KL(reference)((), [leaf])[0].backward()
    assert leaf.grad.abs().min() > 0


def test_a_reference_comes_from_an_argument_an_input_or_a_function():
    datum = Datum(ModelInput.from_ints([1, 2, 3, 4]), {"logprobs": Q})
    for reference in ([torch.tensor(Q)], torch.tensor(Q), "logprobs", lambda data: [torch.tensor(Q)] * len(data)):
        assert value(KL(reference), P, data=[datum]) == pytest.approx(0.106440, abs=1e-6)
    for wrong in ([torch.tensor(Q[:2])], [torch.tensor(Q)] * 2):
        with pytest.raises(InvalidRequestError, match="shapes"):
            value(KL(wrong), P)
    with pytest.raises(InvalidRequestError, match=r"loss_fn_inputs\['q'\]"):
        value(KL("q"), P, data=[datum])


def test_a_token_of_no_probability_adds_nothing():
    assert value(KL([torch.tensor([0.0, math.log(0.5)])]), [0.0, -math.inf]) == 0.0


@pytest.mark.parametrize(
    ("metric", "expected"), [("mse", (1 + 4) / 2), ("l1", 1.5), ("cosine", 1 - 11 / math.sqrt(5 * 25)), ("kl", None)]
)
def test_consistency_with_a_pair(metric, expected):
    rows, pair = ([1.0, 2.0], [2.0, 4.0]) if metric != "cosine" else ([1.0, 2.0], [3.0, 4.0])
    if metric == "kl":
        rows, pair, expected = P, Q, 0.106440
    assert checked(Consistency([torch.tensor(pair)], metric), rows) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("mode", "expected"), [("soft", 1.0), ("hard", 0 + 1 + 1 + 1), ("spectral", (3 - 2) ** 2 + 2)]
)
def test_orthogonality(mode, expected):
    assert checked(Orthogonality(mode), [[1.0, 0.0], [1.0, 1.0]]) == pytest.approx(expected)
    assert checked(Orthogonality(mode), [1.0, 0.0], [1.0, 1.0]) == pytest.approx(expected)


def test_rows_of_different_lengths_have_no_angle():
    with pytest.raises(InvalidRequestError, match="different lengths"):
        value(Orthogonality(), [1.0], [1.0, 2.0])


def test_gradient_penalty():
    assert value(GradientPenalty(), X) == pytest.approx((math.sqrt(3) - 1) ** 2, abs=1e-12)
    squares = GradientPenalty(lambda x: x.square().sum(), target=0.0)
    assert checked(squares, X) == pytest.approx(4 * 14)
    halfway = GradientPenalty(
        lambda x: x.square().sum(), target=0.0, interpolate=[torch.tensor([3.0, 2.0, 1.0])], alpha=0.5
    )
    assert checked(halfway, X) == pytest.approx(4 * (4 + 0 + 4))


@pytest.mark.parametrize(
    "make",
    [
        lambda: L1("weights"),
        lambda: L1(lambda_=-1),
        lambda: L1("field"),
        lambda: L2(reduction="max"),
        lambda: L2(clip=0),
        lambda: ElasticNet(l1_ratio=1.5),
        lambda: Entropy("up"),
        lambda: Entropy(temperature=0),
        lambda: KL("q", "back"),
        lambda: Consistency("q", "dot"),
        lambda: Orthogonality("firm"),
        lambda: GradientPenalty(target=math.nan),
        lambda: GradientPenalty(alpha=2),
    ],
)
def test_settings_that_cannot_be_are_named(make):
    with pytest.raises(InvalidRequestError) as caught:
        make()
    assert caught.value.field

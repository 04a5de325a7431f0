"""Custom losses as graphs: what is computed, and everything that is refused."""

import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from tg_tinker.errors import InvalidRequestError
from tg_tinker_server.engine.loss_fns.graph import parse_graph

N = 6


def inputs_of(*names, shape=(N,), seed=0):
    rng = np.random.default_rng(seed)
    return {"target_tokens": np.ones(shape, dtype=np.int64)} | {
        name: rng.normal(size=shape).astype(np.float32) for name in names
    }


def by_torch(function, lp, inputs):
    """The function itself, called and differentiated."""
    leaf = torch.tensor(lp, requires_grad=True)
    loss, metrics = function(leaf, *(torch.from_numpy(v) for k, v in inputs.items() if k != "target_tokens"))
    loss.backward()
    return loss.item(), leaf.grad.numpy(), {k: float(v.detach()) for k, v in metrics.items()}


def ratio_loss(logprobs, old, advantages):
    ratio = torch.exp(logprobs - old)
    kept = torch.minimum(ratio * advantages, torch.clamp(ratio, 0.8, 1.2) * advantages)
    return -kept.sum() / logprobs.shape[0], {"custom/kl:mean": (old - logprobs).mean()}


def odd_functions(logprobs, weights):
    x = functional.softplus(-logprobs) + functional.logsigmoid(logprobs) * weights
    y = torch.where(weights > 0, x, torch.zeros_like(x))[1:] - x[:-1]
    z = y.cumsum(dim=0)
    z += 1.0
    z = z.masked_fill(z > 5, float("-inf")).clamp(min=-3.0) + functional.relu(z) + functional.log_softmax(z, dim=-1)
    best = z.max(dim=0).values
    more = functional.huber_loss(z, z * 2, delta=0.5) + functional.mse_loss(logprobs, weights, reduction="sum")
    mask = ~(weights > 0)
    return z.sum() + best * 0.1 + torch.logsumexp(logprobs, dim=-1) + more, {
        "custom/masked:sum": mask.sum().to(torch.float32),
        "custom/best:mean": best.detach() ** 2,
    }


def two_dimensions(logprobs, weights):
    entropy = -(logprobs.exp() * logprobs).sum(dim=-1, keepdim=True)
    stacked = torch.stack([entropy, entropy * 2], dim=0)[0, ..., None].squeeze(-1)
    order = torch.arange(logprobs.size(0)).unsqueeze(1)
    return (stacked * weights.mean()).sum() + logprobs.norm() + logprobs.norm(dim=1).sum() + (
        order * logprobs
    ).sum() * 0.01, {}


@pytest.mark.parametrize(
    ("function", "names", "shape"),
    [
        (ratio_loss, ["old", "advantages"], (N,)),
        (odd_functions, ["weights"], (N,)),
        (two_dimensions, ["weights"], (N, 3)),
    ],
)
def test_a_graph_gives_what_its_function_gives(data, function, names, shape):
    inputs = inputs_of(*names, shape=shape)
    lp = -np.random.default_rng(1).random(shape).astype(np.float32)
    graph = parse_graph(data.encoded(function, **dict.fromkeys(["logprobs", *names], len(shape))))
    assert graph.inputs == tuple(names)
    graph.check(0, inputs)
    found = graph.evaluate(lp, inputs, train=True)
    value, slope, metrics = by_torch(function, lp, inputs)
    assert found.value == pytest.approx(value, rel=1e-6)
    np.testing.assert_allclose(found.slope, slope, rtol=1e-6, atol=1e-7)
    assert found.metrics == pytest.approx(metrics)
    assert graph.evaluate(lp, inputs, train=False).slope is None


def test_an_input_is_never_changed(data):
    def changes(logprobs, weights):
        weights = weights.float()
        weights += 1
        return (logprobs * weights).sum(), {}

    inputs = inputs_of("weights")
    kept = inputs["weights"].copy()
    parse_graph(data.encoded(changes)).evaluate(np.zeros(N, np.float32), inputs, train=True)
    np.testing.assert_array_equal(inputs["weights"], kept)


def test_a_loss_without_log_probabilities_has_no_slope(data):
    graph = parse_graph(data.encoded(lambda logprobs, weights: (weights.sum(), {})))
    np.testing.assert_array_equal(graph.evaluate(np.zeros(N, np.float32), inputs_of("weights"), train=True).slope, 0)


def node(op="call_method", name="x", target="sum", args=None, **more):
    return {"op": op, "name": name, "target": target, "args": [{"ref": "logprobs"}] if args is None else args} | more


FIRST = node("placeholder", "logprobs", "logprobs", [])


def document(*nodes, result="x", metrics=None, **more):
    output = node("output", "output", "output", [{"tuple": [{"ref": result}, {"dict": metrics or {}}]}])
    return json.dumps({"format": 1, "nodes": [FIRST, *nodes, output]} | more)


def test_the_smallest_graph_is_accepted():
    assert parse_graph(document(node())).inputs == ()


FORBIDDEN = {
    "a function of Python": node("call_function", target="eval", args=["1"]),
    "an import": node("call_function", target="__import__", args=["os"]),
    "a function of os": node("call_function", target="os.system", args=["true"]),
    "torch.load": node("call_function", target="torch.load", args=["/etc/passwd"]),
    "a path through torch": node("call_function", target="torch.os.system", args=["true"]),
    "a private operation": node("call_function", target="torch.ops.aten.sum"),
    "a dunder": node("call_method", target="__reduce__"),
    "an in-place method": node("call_method", target="add_", args=[{"ref": "logprobs"}, 1]),
    "an in-place operator": node("call_function", target="operator.iadd", args=[{"ref": "logprobs"}, 1]),
    "item": node("call_method", target="item"),
    "backward": node("call_method", target="backward"),
    "random numbers": node("call_function", target="torch.rand_like"),
    "dropout": node("call_function", target="torch.nn.functional.dropout"),
    "nonzero": node("call_function", target="torch.nonzero"),
    "a module": node("call_module", target="layer"),
    "an attribute of the graph": node("get_attr", target="weight", args=[]),
    "out": node("call_function", target="torch.exp", kwargs={"out": {"ref": "logprobs"}}),
    "in place by keyword": node("call_function", target="torch.nn.functional.relu", kwargs={"inplace": True}),
    "in place by position": node(
        "call_function", target="torch.nn.functional.relu", args=[{"ref": "logprobs"}, True]
    ),
    "too few arguments": node("call_function", target="torch.add"),
    "too many arguments": node("call_method", target="exp", args=[{"ref": "logprobs"}, 1, 2]),
    "a later node": node("call_method", args=[{"ref": "output"}]),
    "another device": node("call_method", target="to", args=[{"ref": "logprobs"}, {"device": "cuda:0"}]),
    "an unknown dtype": node("call_method", target="to", args=[{"ref": "logprobs"}, {"dtype": "load"}]),
    "an unknown form": node("call_method", args=[{"code": "1"}]),
    "a large number": node("call_function", target="operator.add", args=[{"ref": "logprobs"}, 2**60]),
    "a long text": node("call_method", args=[{"ref": "logprobs"}, "x" * 99]),
    "a deep list": node("call_method", args=[{"ref": "logprobs"}, [[[[[[[[1]]]]]]]]]),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_anything_else_is_refused_by_the_name_of_its_node(what):
    with pytest.raises(InvalidRequestError, match="'x'"):
        parse_graph(document(FORBIDDEN[what]))


WRONG = {
    "no JSON": "{",
    "NaN in JSON": document(node(args=[{"ref": "logprobs"}, math.nan])),
    "very deep JSON": "[" * 100_000,
    "another format": document(node()).replace('"format": 1', '"format": 2'),
    "another key": document(node(), code="import os"),
    "no node": json.dumps({"format": 1, "nodes": []}),
    "two nodes of a name": document(node(), node()),
    "a name that is code": document(node(name="x; import os"), result="x; import os"),
    "no output": json.dumps({"format": 1, "nodes": [FIRST, node()]}),
    "no metrics": json.dumps({"format": 1, "nodes": [FIRST, node(), node("output", "o", "output", [{"ref": "x"}])]}),
    "a metric of another name": document(node(), metrics={"loss:sum": {"ref": "x"}}),
    "a metric that is no tensor": document(node(), metrics={"custom/x:sum": 1.0}),
    "an input after a call": document(node(), node("placeholder", "w", "w", [])),
    "an input of another name first": document(node()).replace('"logprobs"', '"other"'),
    "an input with a default": document(node("placeholder", "w", "w", [1]), node()),
    "other inputs than declared": document(node(), inputs=[{"name": "weights", "rank": 1}]),
    "a rank that cannot be": document(node(), inputs=[{"name": "logprobs", "rank": 7}]),
    "too many nodes": document(*(node(name=f"x{i}") for i in range(1001)), result="x1"),
    "too large": document(node(), inputs=["x" * 300_000]),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_graph_is_refused(what):
    with pytest.raises(InvalidRequestError):
        parse_graph(WRONG[what])


REFUSED_BY_SHAPE = {
    "a loss that is no scalar": (lambda logprobs: (logprobs * 2, {}), "scalar"),
    "a loss of whole numbers": (lambda logprobs: ((logprobs > 0).sum(), {}), "floats"),
    "a metric that is no scalar": (lambda logprobs: (logprobs.sum(), {"custom/x:sum": logprobs}), "custom/x:sum"),
    "shapes that do not fit": (lambda logprobs: ((logprobs[1:] + logprobs[2:]).sum(), {}), "add"),
    "a mask as index": (lambda logprobs: (logprobs[logprobs > 0].sum(), {}), "where"),
    "a result too large": (lambda logprobs: (logprobs.expand(10**8, 6).sum(), {}), "numbers"),
    "a table too large": (lambda logprobs: (torch.full_like(logprobs, 1.0).repeat(10**9).sum(), {}), "numbers"),
    "too many results": (lambda logprobs: (logprobs.repeat(99).split(1)[0].sum(), {}), "results"),
    "a norm of a matrix": (lambda logprobs: (logprobs.unsqueeze(1).norm("nuc"), {}), "nuc"),
    "a number without end": (lambda logprobs: (logprobs.sum() * (logprobs.shape[0] ** 9**9), {}), "pow"),
    "an index out of range": (lambda logprobs: (logprobs[99], {}), "getitem"),
    "an attribute": (lambda logprobs: (logprobs.grad_fn, {}), "grad_fn"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED_BY_SHAPE)
def test_shapes_are_worked_out_before_anything_is_computed(data, what):
    function, word = REFUSED_BY_SHAPE[what]
    graph = parse_graph(data.encoded(function))
    with pytest.raises(InvalidRequestError, match=word):
        graph.check(0, inputs_of())


def test_many_nodes_together_may_not_make_too_many_numbers(data):
    def long(logprobs):
        for _ in range(400):
            logprobs = logprobs + 1
        return logprobs.sum(), {}

    graph = parse_graph(data.encoded(long))
    graph.check(0, inputs_of(shape=(4096,)))
    with pytest.raises(InvalidRequestError, match="numbers"):
        graph.check(0, inputs_of(shape=(100_000,)))


def test_inputs_that_are_missing_or_of_another_rank_are_refused_by_name(data):
    graph = parse_graph(data.encoded(ratio_loss))
    with pytest.raises(InvalidRequestError, match="advantages") as e:
        graph.check(3, inputs_of("old"))
    assert e.value.field == "loss_fn_inputs.advantages"
    with pytest.raises(InvalidRequestError, match="dimensions"):
        graph.check(0, inputs_of("old", "advantages", shape=(N, 2)))
    alone = parse_graph(data.encoded(lambda logprobs: (logprobs.sum(), {}), logprobs=2))
    alone.check(0, inputs_of(shape=(N, 2)))
    with pytest.raises(InvalidRequestError, match="logprobs of datum 7 has 1 dimensions"):
        alone.check(7, inputs_of())


def test_what_fails_by_values_is_a_loss_that_is_not_a_number(data):
    def picks(logprobs, index):
        return logprobs[index.long()].sum(), {"custom/x:sum": logprobs.sum()}

    graph = parse_graph(data.encoded(picks))
    graph.check(0, inputs_of("index"))
    found = graph.evaluate(np.zeros(N, np.float32), {**inputs_of(), "index": np.float32([0] * 5 + [99])}, train=True)
    assert math.isnan(found.value)
    assert np.isnan(found.slope).all()
    assert math.isnan(found.metrics["custom/x:sum"])


def test_metrics_are_summed_or_averaged_over_datums_by_their_suffix(bench, data):
    asked = data.request("custom", train=False)
    found = bench.open().forward_backward(asked)
    kl = [np.mean(i["old"] - lp) for i, lp in zip(asked.inputs, found.logprobs, strict=True)]
    tokens = sum(int((i["advantages"] != 0).sum()) for i in asked.inputs)
    assert found.metrics == pytest.approx({"custom/kl:mean": np.mean(kl), "custom/tokens:sum": tokens}, rel=1e-5)


def test_ppo_as_a_graph_is_ppo(bench, data):
    session = bench.open()
    by_graph, built_in = (session.forward_backward(data.request(name)) for name in ("custom", "ppo"))
    assert by_graph.loss == pytest.approx(built_in.loss, rel=1e-5)
    np.testing.assert_allclose(by_graph.contribution.sum_P, built_in.contribution.sum_P, atol=1e-5)


def test_a_graph_that_does_not_fit_is_refused_before_any_model_work(bench, data):
    session = bench.open()
    shifted = data.encoded(lambda logprobs, old: ((logprobs + old[1:]).sum(), {}))
    for graph, word in ((shifted, "'add'"), (document(FORBIDDEN["item"]), "'x'"), ("", "no graph")):
        with pytest.raises(InvalidRequestError, match=word):
            session.check(data.request("custom", graph=graph))


def test_what_all_datums_of_a_call_cost_together_is_bounded(bench, data):
    session = bench.open()

    def wide(logprobs):
        return logprobs.repeat(2**18).exp().sum(), {}

    graph = parse_graph(data.encoded(wide))
    per_datum = graph.check(0, inputs_of(shape=(8,)))
    assert per_datum == 2 * 8 * 2**18 + 1  # the copies, their exponentials, the sum
    fits = 2**28 // per_datum
    lengths = (8,) * (fits + 1)
    session.check(data.request("custom", lengths[:-1], graph=data.encoded(wide)))
    with pytest.raises(InvalidRequestError, match=f"by datum {fits} of {fits + 1}; send fewer"):
        session.check(data.request("custom", lengths, graph=data.encoded(wide)))

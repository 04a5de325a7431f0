import json
import math

import pytest
import torch

from tg_tinker.custom import trace_loss
from tg_tinker.errors import InvalidRequestError

OUTSIDE = torch.ones(1)


def clipped(logprobs, advantages, weights):
    ratio = torch.exp(logprobs - advantages) ** 2
    loss = -(torch.minimum(ratio, ratio.clamp(0.8, max=math.inf)) * weights[..., 0:3:2].to(torch.float32)).sum()
    normal = torch.nn.functional.log_softmax(logprobs, dim=-1).mean(dim=(0,))
    return loss + 0 * normal, {"custom/ratio:mean": ratio.mean(), "custom/n:sum": ratio.sum()}


RANKS = {"logprobs": 1, "advantages": 1, "weights": 1}


def nodes(handle):
    return {n["name"]: n for n in json.loads(handle.graph_json)["nodes"]}


def test_a_function_becomes_plain_data():
    handle = trace_loss(clipped, RANKS)
    document = json.loads(handle.graph_json)
    assert document["format"] == 1
    assert document["inputs"][0] == {"name": "logprobs", "rank": 1}
    assert handle.input_names == ("advantages", "weights")
    found = nodes(handle)
    assert found["sub"]["target"] == "operator.sub"
    assert found["sub"]["args"] == [{"ref": "logprobs"}, {"ref": "advantages"}]
    assert found["exp"]["target"] == "torch.exp"
    assert found["clamp"]["kwargs"] == {"max": {"float": "inf"}}
    assert found["log_softmax"]["target"] == "torch.nn.functional.log_softmax"
    assert found["getitem"]["args"][1] == {"tuple": [{"ellipsis": True}, {"slice": [0, 3, 2]}]}
    assert found["to"]["args"][1] == {"dtype": "float32"}
    assert found["output"]["args"][0]["tuple"][1]["dict"]["custom/n:sum"] == {"ref": found["sum_2"]["name"]}


def test_a_handle_runs_what_was_traced():
    handle = trace_loss(clipped, RANKS)
    lp, advantages, weights = torch.tensor([-1.0, -2.0]), torch.tensor([0.5, 1.0]), torch.tensor([1.0, 2.0, 3.0])
    loss, metrics = handle(lp, weights=weights, advantages=advantages)
    expected, _ = clipped(lp, advantages, weights)
    assert loss == expected
    assert set(metrics) == {"custom/ratio:mean", "custom/n:sum"}


def branches(logprobs):
    return (logprobs.sum() if logprobs.sum() > 0 else logprobs.mean()), {}


@pytest.mark.parametrize(
    ("fn", "ranks", "says"),
    [
        (branches, {"logprobs": 1}, "branch"),
        (lambda lp: (lp.sum(), {}), {"lp": 1}, "first parameter"),
        (lambda logprobs, weights=1: (logprobs.sum(), {}), {"logprobs": 1, "weights": 1}, "without a default"),
        (lambda logprobs, *rest: (logprobs.sum(), {}), {"logprobs": 1, "rest": 1}, "plain parameter"),
        (lambda logprobs, Weights: (logprobs.sum(), {}), {"logprobs": 1, "Weights": 1}, "lower-case"),
        (lambda logprobs: (logprobs.sum(), {}), {"logprobs": 0}, "input_ranks"),
        (lambda logprobs: (logprobs.sum(), {}), {}, "input_ranks"),
        (lambda logprobs: ((logprobs * OUTSIDE).sum(), {}), {"logprobs": 1}, "from outside"),
        (lambda logprobs: (logprobs.sum(), {"loss:sum": logprobs.sum()}), {"logprobs": 1}, "custom/<name>"),
        (lambda logprobs: (logprobs.sum(), {"custom/a:sum": 1.0}), {"logprobs": 1}, "must be a tensor"),
        (lambda logprobs: logprobs.sum(), {"logprobs": 1}, r"\(loss, metrics\)"),
        (lambda logprobs: (1.0, {}), {"logprobs": 1}, "the loss a tensor"),
        (lambda logprobs: (logprobs.sum(), [1]), {"logprobs": 1}, "dict"),
        (lambda logprobs: (logprobs.sum().item(), {}), {"logprobs": 1}, "leaves torch"),
        (lambda logprobs: (logprobs.sum().backward(), {}), {"logprobs": 1}, "backward"),
        (lambda logprobs: (logprobs.frobnicate(), {}), {"logprobs": 1}, "no method"),
        (lambda logprobs: (len(logprobs) * logprobs.sum(), {}), {"logprobs": 1}, "branch"),
    ],
)
def test_what_cannot_be_sent_is_refused_with_the_reason(fn, ranks, says):
    with pytest.raises(InvalidRequestError, match=says):
        trace_loss(fn, ranks)


@pytest.mark.slow
def test_the_official_client_writes_the_same():
    from tinker.lib.public_interfaces.custom_loss import encode_graph
    from tinker.lib.public_interfaces.custom_loss import trace_loss as theirs

    document = json.loads(trace_loss(clipped, RANKS).graph_json)
    graph = encode_graph(theirs(clipped, RANKS, "session")).model_dump()
    assert document["nodes"] == json.loads(json.dumps(graph["nodes"]))
    assert document["format"] == graph["format"]

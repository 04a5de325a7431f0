"""Graphs as the public SDK's create_custom_loss writes them, run by the SDK itself and by us."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from tg_tinker_server.engine.loss_fns.graph import parse_graph
from tg_tinker_server.engine.loss_fns.values import joined_metrics, total


def preference(logprobs, weights, margin):
    score = (logprobs * weights).sum() - margin
    return -functional.logsigmoid(score), {"custom/score:mean": score, "custom/wins:sum": (score > 0).float()}


def clipped(logprobs, weights, margin):
    ratio = torch.exp(logprobs - weights).clamp(0.5, max=2.0)
    kept = torch.where(weights > 0, ratio, torch.zeros_like(ratio))[..., :-1]
    return -kept.sum() / logprobs.shape[0] + margin**2, {"custom/largest:mean": ratio.max()}


@pytest.mark.parametrize("loss", [preference, clipped])
def test_loss_slopes_and_metrics_are_those_of_the_sdk(loss):
    import tinker
    from tinker.lib.public_interfaces.custom_loss import encode_graph, run_loss_handle, trace_loss

    handle = trace_loss(loss, {"logprobs": 1, "weights": 1, "margin": 0}, "session")
    graph = parse_graph(encode_graph(handle).model_dump_json())
    rng = np.random.default_rng(0)
    data, leaves, losses = [], [], []
    for n in (3, 5, 8):
        inputs = {
            "target_tokens": rng.integers(0, 9, n),
            "weights": rng.normal(size=n).astype(np.float32),
            "margin": np.float32(rng.normal()).reshape(()),
        }
        lp = -rng.random(n).astype(np.float32)
        graph.check(0, inputs)
        losses.append(graph.evaluate(lp, inputs, train=True))
        leaves.append(torch.tensor(lp, requires_grad=True))
        tensors = {k: tinker.TensorData.from_numpy(v) for k, v in inputs.items()}
        data.append(tinker.Datum(model_input=tinker.ModelInput.from_ints([1] * n), loss_fn_inputs=tensors))
    expected, metrics = run_loss_handle(handle, data, leaves)
    expected.backward()
    assert total([one.value for one in losses]) == pytest.approx(expected.item(), rel=1e-6)
    assert joined_metrics(losses) == pytest.approx(metrics, rel=1e-6)
    for one, leaf in zip(losses, leaves, strict=True):
        np.testing.assert_allclose(one.slope, leaf.grad.numpy(), rtol=1e-6, atol=1e-7)

"""The cross-entropy that never holds all logits against torch's, which does."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tg_tinker_server.engine import chunked_head
from tg_tinker_server.engine.chunked_head import chunked_cross_entropy, chunked_log_probabilities


def layer(targets, hidden, vocabulary, *, seed=0, bias=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(targets, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float64).to(dtype)
    offset = torch.randn(vocabulary, generator=generator, dtype=torch.float64).to(dtype) if bias else None
    tokens = torch.randint(vocabulary, (targets,), generator=generator)
    return h, weight, offset, tokens


def several(tokens, vocabulary, alternatives, *, seed=0):
    """More alternatives of each target, the same one twice among them."""
    generator = torch.Generator().manual_seed(seed + 1)
    more = torch.randint(vocabulary, (len(tokens), alternatives - 1), generator=generator)
    return torch.cat([tokens[:, None], more], dim=1)


@given(
    targets=st.integers(1, 300),
    hidden=st.integers(1, 9),
    vocabulary=st.integers(1, 40),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_losses_and_gradient_are_those_of_all_logits(targets, hidden, vocabulary, bias, seed):
    h, weight, offset, tokens = layer(targets, hidden, vocabulary, seed=seed, bias=bias)
    upstream = torch.randn(targets, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = torch.nn.functional.cross_entropy(
        torch.nn.functional.linear(h, weight, offset), tokens, reduction="none"
    )
    (expected_gradient,) = torch.autograd.grad(expected, h, upstream)
    found = chunked_cross_entropy(h, weight, offset, tokens)
    (gradient,) = torch.autograd.grad(found, h, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-11)


def test_logits_are_held_for_one_chunk_at_a_time(monkeypatch):
    """Watches every tensor that is made: none is as large as the logits of two chunks."""
    h, weight, _, tokens = layer(1000, 4, 500, dtype=torch.float32, bias=False)
    monkeypatch.setattr(chunked_head, "CHUNK_BYTES", 1)  # the smallest chunk, 128 targets
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.extend(
                t.numel() for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, torch.Tensor)
            )
            return out

    with Watch():
        chunked_cross_entropy(h, weight, None, tokens).sum().backward()
    assert max(largest) <= 128 * 500


def test_extreme_logits_are_neither_infinite_nor_nan():
    h = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]])
    losses = chunked_cross_entropy(h, weight, None, torch.tensor([1, 0]))
    losses.sum().backward()
    np.testing.assert_allclose(losses.detach().numpy(), [2e4, 2e4])
    np.testing.assert_allclose(h.grad.numpy(), [[2.0], [-2.0]])


def test_a_row_that_is_not_finite_leaves_the_others_alone():
    h, weight, _, tokens = layer(5, 3, 7, bias=False)
    clean = chunked_cross_entropy(h, weight, None, tokens).detach()
    with torch.no_grad():
        h[2] = float("nan")
    losses = chunked_cross_entropy(h, weight, None, tokens)
    losses.sum().backward()
    keep = [0, 1, 3, 4]
    assert torch.equal(losses[keep], clean[keep])
    assert torch.isfinite(h.grad[keep]).all()
    assert torch.isnan(losses[2])


@pytest.mark.parametrize("gradient", [True, False])
def test_half_precision_rounds_once(gradient):
    h, weight, offset, tokens = layer(50, 16, 30, dtype=torch.bfloat16)
    exact = torch.nn.functional.cross_entropy(
        torch.nn.functional.linear(h.double(), weight.double(), offset.double()), tokens, reduction="none"
    )
    with torch.set_grad_enabled(gradient):
        losses = chunked_cross_entropy(h, weight, offset, tokens)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), exact, rtol=2e-2, atol=2e-2 * float(exact.detach().max()))
    if gradient:
        losses.sum().backward()
        assert h.grad.dtype == torch.bfloat16


def test_no_target_at_all_costs_nothing():
    h = torch.zeros(0, 4, requires_grad=True)
    losses = chunked_cross_entropy(h, torch.ones(9, 4), None, torch.zeros(0, dtype=torch.int64))
    losses.sum().backward()
    assert losses.shape == (0,)


@given(
    targets=st.integers(0, 300),
    hidden=st.integers(1, 9),
    vocabulary=st.integers(1, 40),
    alternatives=st.integers(1, 5),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_log_probabilities_of_several_alternatives_are_those_of_all_logits(
    targets, hidden, vocabulary, alternatives, bias, seed
):
    h, weight, offset, tokens = layer(targets, hidden, vocabulary, seed=seed, bias=bias)
    tokens = several(tokens, vocabulary, alternatives, seed=seed)
    upstream = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    upstream[::2] = 0.0  # positions that do not count
    expected = torch.log_softmax(torch.nn.functional.linear(h, weight, offset), dim=-1).gather(1, tokens)
    (expected_gradient,) = torch.autograd.grad(expected, h, upstream)
    found = chunked_log_probabilities(h, weight, offset, tokens)
    (gradient,) = torch.autograd.grad(found, h, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-11)
    assert (gradient[::2] == 0).all()


def test_neither_logits_nor_a_row_of_the_head_for_each_alternative_are_held(monkeypatch):
    h, weight, _, tokens = layer(1000, 40, 500, dtype=torch.float32, bias=False)
    monkeypatch.setattr(chunked_head, "CHUNK_BYTES", 1)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with Watch():
        chunked_log_probabilities(h, weight, None, several(tokens, 500, 20)).sum().backward()
    assert max(largest) <= 128 * 500


def test_an_alternative_that_cannot_be_has_no_part_in_the_gradient():
    h = torch.randn(4, 3, requires_grad=True)
    weight, offset = torch.randn(5, 3), torch.tensor([0.0, float("-inf"), 0.0, 0.0, 0.0])
    logprobs = chunked_log_probabilities(h, weight, offset, torch.tensor([[0, 1]] * 4))
    assert torch.isneginf(logprobs[:, 1]).all()
    (gradient,) = torch.autograd.grad(logprobs, h, torch.tensor([[1.0, 0.0]] * 4))
    assert torch.isfinite(gradient).all()


def test_log_probabilities_in_half_precision_are_float32_and_near():
    h, weight, offset, tokens = layer(50, 16, 30, dtype=torch.bfloat16)
    tokens = several(tokens, 30, 3)
    found = chunked_log_probabilities(h, weight, offset, tokens)
    exact = torch.log_softmax(torch.nn.functional.linear(h.double(), weight.double(), offset.double()), dim=-1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact.gather(1, tokens), rtol=2e-2, atol=0.2)
    found.sum().backward()
    assert h.grad.dtype == torch.bfloat16

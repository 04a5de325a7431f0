"""The fused RMSNorm against the models' own, and where it keeps away."""

import copy

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tg_tinker_server.engine.fused_norm import fuse_norms


def norm(kind=LlamaRMSNorm, size=12, **settings):
    torch.manual_seed(0)
    module = kind(size, **settings)
    with torch.no_grad():
        module.weight.uniform_(0.5, 1.5)
    return module.requires_grad_(False)


def fused(module):
    fuse_norms(module)
    return module


def is_fused(module):
    return "forward" in module.__dict__


@pytest.mark.parametrize("kind", [LlamaRMSNorm, nn.RMSNorm])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_value_and_gradient_are_those_of_the_formula_in_float64(kind, eps):
    module = fused(norm(kind, eps=eps).double())
    assert is_fused(module)
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    expected = module.weight * x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(module, (x,))


def test_float32_agrees_with_the_model_s_own():
    plain, own = norm(), fused(norm())
    x = torch.randn(3, 7, 12, requires_grad=True)
    g = torch.randn(3, 7, 12)
    torch.testing.assert_close(own(x), plain(x))
    torch.testing.assert_close(torch.autograd.grad(own(x), x, g), torch.autograd.grad(plain(x), x, g))


def test_a_norm_that_computes_something_else_keeps_its_own_forward():
    assert not is_fused(fused(norm(Gemma2RMSNorm))), "it multiplies by one plus its weight"


def test_a_trained_weight_and_half_precision_go_the_usual_way():
    module = fused(norm())
    module.weight.requires_grad_(True)
    x = torch.randn(2, 3, 12)
    module(x).sum().backward()
    assert module.weight.grad is not None
    assert module(x.bfloat16()).dtype == norm()(x.bfloat16()).dtype


def test_a_copy_of_a_module_computes_with_its_own_weight():
    module = fused(norm())
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.weight.mul_(2.0)
    x = torch.randn(2, 3, 12)
    torch.testing.assert_close(twin(x), 2.0 * module(x))


@pytest.mark.parametrize("needed", [True, False])
def test_a_norm_with_a_gate_computes_as_before(needed):
    class GatedRMSNorm(LlamaRMSNorm):
        if needed:

            def forward(self, hidden_states, gate):
                return super().forward(hidden_states) * gate
        else:

            def forward(self, hidden_states, gate=None):
                return super().forward(hidden_states) * (1.0 if gate is None else gate)

    module = fused(norm(GatedRMSNorm))
    x, gate = torch.randn(2, 3, 12), torch.randn(2, 3, 12)
    assert not is_fused(module)
    assert torch.equal(module(x, gate), LlamaRMSNorm.forward(module, x) * gate)

"""Per-sample gradients of ordinary trained modules (linear, embedding, norms, ...) by Opacus's own samplers.

A tap computes the module with its parameters held constant, and listens to the gradient of its output. Opacus's
hooks keep activations in lists and count passes, which non-reentrant checkpointing upsets; a tap keeps what it needs
in the autograd graph, so that recomputing it, or using a module twice, just works.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from opacus.grad_sample import GradSampleHooks
from opacus.grad_sample.functorch import ft_compute_per_sample_gradient, prepare_layer
from torch import nn
from torch.autograd.function import once_differentiable

from tg_tinker_server.engine.grad_rows import GradRows

Sampler = Callable[[nn.Module, list[torch.Tensor], torch.Tensor], dict[nn.Parameter, torch.Tensor]]


class _Tap(torch.autograd.Function):
    """Passes its first argument on; its backward pass hands the gradient to ``record``."""

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        anchor: torch.Tensor,  # makes the output require gradients  # noqa: ARG004
        x: torch.Tensor,
        record: Callable[[torch.Tensor, torch.Tensor], None],
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.record = record
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        ctx.record(x.detach(), g)
        return g, None, None, None


class ModuleTap:
    """A tap on one module; ``remove`` takes it off.

    Args:
        module: holds trained parameters directly; its first argument is the batch, records first.
        current: where per-sample gradients go now; ``None`` makes the module an ordinary one.
    """

    def __init__(self, module: nn.Module, current: Callable[[], GradRows | None]) -> None:
        self._module = module
        self._current = current
        # A second view of the module, on the same parameters, whose forward is that of its class.
        self._plain = copy.copy(module)
        self._plain.__dict__.pop("forward", None)
        self._sampler: Sampler = GradSampleHooks.GRAD_SAMPLERS.get(type(module), ft_compute_per_sample_gradient)
        if self._sampler is ft_compute_per_sample_gradient:
            prepare_layer(self._plain, batch_first=True)
        module.forward = self._forward

    def remove(self) -> None:
        """Give the module its own forward back."""
        self._module.__dict__.pop("forward", None)

    def _forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        grads = self._current()
        if grads is None or not torch.is_grad_enabled():
            result: torch.Tensor = self._plain(x, *args, **kwargs)
            return result
        trained = [p for p in self._plain.parameters(recurse=False) if p.requires_grad]
        constants = {name: p.detach() for name, p in self._plain.named_parameters(recurse=False)}
        y = torch.func.functional_call(self._plain, constants, (x, *args), kwargs)

        def record(x: torch.Tensor, g: torch.Tensor) -> None:
            with torch.enable_grad():
                samples = self._sampler(self._plain, [x], g)
            for parameter in trained:
                if parameter in samples:
                    grads.add(parameter, samples[parameter].detach())

        tapped: torch.Tensor = cast(Any, _Tap).apply(y, trained[0], x, record)
        return tapped

"""A linear layer with a low-rank adapter as one autograd function, and what its backward pass leaves out.

    y = x W^T + b + s (x A^T) B^T          x [N, T, i], A [r, i], B [o, r], W [o, i] frozen

With g = dL/dy the backward pass computes dx = g W + s (g B) A, and per record n

    dL_n/dA = s (g_n B)^T x_n   [r, i]        (dL_n/dB)^T = s (x_n A^T)^T g_n   [r, o]

from products that a non-private step needs as well, only batched over records. No gradient of W, and under privacy
no sum over records, is ever formed. A frozen factor has no gradient, so what only it needs (x for A, x A^T for B) is
not kept. Derivation and sources: docs/how-dp-lora-works.md.

The rows of one pass may belong to several adapters: A and B are then [K, r, i] and [K, o, r], one for each of K equal
blocks of rows, down to one row each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from tg_tinker_server.engine.grad_rows import GradRows


@dataclass(frozen=True, slots=True)
class Rows:
    """Whose the rows of the pass under way are, and where its per-sample gradients go.

    Attributes:
        adapters: names, one for each block of consecutive rows.
        counts: rows of each block; not needed for a single adapter.
        grads: where per-sample gradients are written; ``None`` leaves gradients to autograd.
    """

    adapters: tuple[str, ...]
    counts: tuple[int, ...] = ()
    grads: GradRows | None = None

    @property
    def block_of_row(self) -> list[int] | None:
        """Which block each row is in; ``None`` if all blocks are of one size, so that they can stay whole."""
        if len(set(self.counts)) == 1:
            return None
        return [block for block, count in enumerate(self.counts) for _ in range(count)]


class _FusedLoRA(torch.autograd.Function):
    """See the module. Without ``grads`` the gradients of A and B are summed over records and returned."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        anchor: torch.Tensor | None,  # makes the output require gradients where A and B are copies  # noqa: ARG004
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        scale: float | torch.Tensor,
        grads: GradRows | None,
        owners: tuple[nn.Parameter, nn.Parameter],
    ) -> torch.Tensor:
        trains_A, trains_B = (p.requires_grad if grads is None else grads.wants(p) for p in owners)
        rows = _blocks(x, A)
        low = rows @ A.to(x.dtype).mT
        low *= scale
        if weight is None:
            y = low @ B.to(x.dtype).mT
        else:
            y = functional.linear(rows, weight, bias)
            _add_product(y, low, B.to(x.dtype).mT)
        ctx.save_for_backward(x if trains_A else None, low if trains_B else None, A, B, weight)
        ctx.scale, ctx.grads, ctx.owners, ctx.shape = scale, grads, owners, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, low, A, B, weight = ctx.saved_tensors
        g_rows = _blocks(g, A)
        dx: torch.Tensor | None = None
        g_low: Any = None  # of no use to B
        if ctx.needs_input_grad[0] or x is not None:
            g_low = g_rows @ B.to(g.dtype)
            g_low *= ctx.scale
        if ctx.needs_input_grad[0]:
            if weight is None:
                dx = g_low @ A.to(g.dtype)
            else:
                dx = g_rows @ weight
                _add_product(dx, g_low, A.to(g.dtype))
            dx = dx.view(ctx.shape)
        dA = dB = None
        if ctx.grads is None:
            if x is not None:
                dA = g_low.to(A.dtype).mT @ x.reshape(-1, x.shape[-1]).to(A.dtype)
            if low is not None:
                dB = (low.to(B.dtype).mT @ g_rows.to(B.dtype)).mT
        else:
            # Inputs that were flattened lack the records' dimension: they are refused there, by shape.
            n = ctx.shape[0]
            per_record = (n, -1, B.shape[-1])
            owner_A, owner_B = ctx.owners
            if x is not None:
                ctx.grads.add_product(owner_A, g_low.view(per_record).mT, x.reshape(n, -1, x.shape[-1]))
            if low is not None:
                ctx.grads.add_product(owner_B, low.view(per_record).mT, g.reshape(n, -1, g.shape[-1]))
        return dx, dA, dB, None, None, None, None, None, None


def _blocks(x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """All tokens as rows of one matrix, or of one for each block that has an adapter of its own."""
    return x.reshape(len(A), -1, x.shape[-1]) if A.dim() == 3 else x.reshape(-1, x.shape[-1])


def _add_product(y: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """y += left @ right, in place."""
    if y.dim() == 3:
        y.baddbmm_(left, right)
    else:
        y.addmm_(left, right)


def can_fuse(layer: nn.Module) -> bool:
    """Whether a PEFT layer is plain LoRA over something with a linear's two parameters, so that we know its rule."""
    return isinstance(layer, LoraLayer) and isinstance(layer.get_base_layer(), nn.Linear | Conv1D)


def fuse(layer: Any, current: Callable[[], Rows | None]) -> None:
    """Replace the forward of one PEFT layer by the fused one, for the rows that ``current`` names."""
    unfused = layer.forward

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows = current()
        if rows is not None and rows.adapters[0] not in layer.lora_A:
            return cast(torch.Tensor, layer.base_layer(x))
        if rows is None or rows.adapters[0] in layer.lora_variant:  # a variant has no rule of ours, and none under DP
            return cast(torch.Tensor, unfused(x, *args, **kwargs))
        return _forward(layer, x, rows)

    layer.forward = forward


def _forward(layer: Any, x: torch.Tensor, rows: Rows) -> torch.Tensor:
    first = rows.adapters[0]
    owners = (layer.lora_A[first].weight, layer.lora_B[first].weight)
    dropout = layer.lora_dropout[first]
    weight, bias = _frozen(layer.base_layer)
    base_output = None
    low_input = x
    if weight is None or (isinstance(dropout, nn.Dropout) and dropout.p > 0 and dropout.training):
        base_output = layer.base_layer(x)
        low_input, weight, bias = dropout(x), None, None
    scale: float | torch.Tensor = layer.scaling[first]
    A, B, anchor = *owners, None
    if rows.grads is not None:
        A, B, anchor = A.detach(), B.detach(), owners[0 if owners[0].requires_grad else 1]
    if len(rows.adapters) > 1:
        A, B, scale = _per_block(layer, rows)
    y: torch.Tensor = cast(Any, _FusedLoRA).apply(low_input, A, B, anchor, weight, bias, scale, rows.grads, owners)
    return y if base_output is None else base_output + y


def _per_block(layer: Any, rows: Rows) -> tuple[torch.Tensor, torch.Tensor, float | torch.Tensor]:
    """A [K, r, i], B [K, o, r] and the scale of each block, or of each row where blocks differ in size."""
    with torch.no_grad():
        A = torch.stack([layer.lora_A[name].weight for name in rows.adapters])
        B = torch.stack([layer.lora_B[name].weight for name in rows.adapters])
        scales = [layer.scaling[name] for name in rows.adapters]
        index = rows.block_of_row
        if index is not None:
            A, B, scales = A[index], B[index], [scales[block] for block in index]
        if len(set(scales)) == 1:
            return A, B, scales[0]
        return A, B, torch.tensor(scales, device=A.device, dtype=A.dtype).view(-1, 1, 1)


def _frozen(base: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Weight [o, i] and bias of a base layer that the fused product may read, or nothing if it is more than that."""
    if type(base) not in (nn.Linear, Conv1D) or any(p.requires_grad for p in base.parameters()):
        return None, None
    weight: Any = base.weight
    bias: Any = base.bias
    return (weight.t() if isinstance(base, Conv1D) else weight), bias

"""The last layer and the cross-entropy in one function that never holds logits of more than a few tokens.

    loss_n = logsumexp(W h_n) - W[t_n] . h_n          h [N, D], W [V, D] frozen, t [N] targets

The gradient needed afterwards, d loss_n / d h_n = softmax(W h_n) W - W[t_n], is N x D and is computed while the
logits of a chunk are at hand; the logits themselves, N x V, are gone with the chunk. Source: Wijmans et al. 2024
(cut cross-entropy); Hsu et al. 2024 (Liger kernels) for the gradient in the forward pass.

Where K log-probabilities of a position are wanted, and what is made of them is not known yet, softmax(W h_n) W is
kept alone. With g_nk the derivative with respect to the k-th,

    d / d h_n = sum_k g_nk W[t_nk] - (sum_k g_nk) softmax(W h_n) W

Shape suffixes: N targets, D hidden size, V vocabulary, C targets of a chunk, K alternatives of a target.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable

from tg_tinker_server.engine.losses import at_least_float32

CHUNK_BYTES = 32 * 2**20
"""Memory for the logits of a chunk, unless ``FEWEST`` targets need more."""
FEWEST = 128
"""With fewer targets at a time the product is slow."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        chunk: int,
    ) -> torch.Tensor:
        losses_N = at_least_float32(h_ND.new_empty(len(h_ND)))
        dh_ND = torch.empty_like(h_ND) if ctx.needs_input_grad[0] else None
        buffer_CV = h_ND.new_empty(min(chunk, len(h_ND)), len(weight_VD))  # one for all chunks: fresh memory is slow
        for start in range(0, len(h_ND), chunk):
            part = slice(start, min(start + chunk, len(h_ND)))
            logits_CV = torch.mm(h_ND[part], weight_VD.t(), out=buffer_CV[: part.stop - part.start])
            if bias_V is not None:
                logits_CV += bias_V
            targets_C = targets_N[part]
            wide_CV = at_least_float32(logits_CV)  # the buffer itself, unless in half precision
            target_C1 = wide_CV.gather(1, targets_C[:, None])
            top_C1 = wide_CV.amax(dim=1, keepdim=True)
            exp_CV = wide_CV.sub_(top_C1).exp_()
            sum_C1 = exp_CV.sum(dim=1, keepdim=True)
            losses_N[part] = (top_C1 + sum_C1.log() - target_C1).squeeze(1)
            if dh_ND is None:
                continue
            if exp_CV.dtype != h_ND.dtype:
                exp_CV, sum_C1 = exp_CV.div_(sum_C1).to(h_ND.dtype), torch.ones_like(sum_C1)
            torch.mm(exp_CV, weight_VD, out=dh_ND[part])
            dh_ND[part] /= sum_C1
            dh_ND[part] -= weight_VD[targets_C]
        ctx.save_for_backward(dh_ND)
        return losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_N: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dh_ND,) = ctx.saved_tensors
        dh_ND *= g_N.to(dh_ND.dtype)[:, None]  # nobody else reads it: a graph is walked once
        return dh_ND, None, None, None, None


def chunked_cross_entropy(
    h_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, targets_N: torch.Tensor
) -> torch.Tensor:
    """Negative log-probability of each target in nats, at least float32 [N]; differentiable in ``h_ND`` once.

    Args:
        h_ND: hidden states in front of the last layer.
        weight_VD: its frozen weight, of the same dtype.
        bias_V: its frozen bias.
        targets_N: token ids, all valid.
    """
    chunk = max(FEWEST, CHUNK_BYTES // (4 * len(weight_VD)))
    losses_N: torch.Tensor = cast(Any, _ChunkedCrossEntropy).apply(h_ND, weight_VD, bias_V, targets_N, chunk)
    return losses_N


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_NK: torch.Tensor,
        chunk: int,
    ) -> torch.Tensor:
        logprobs_NK = at_least_float32(h_ND.new_empty(targets_NK.shape))
        mean_ND = torch.empty_like(h_ND) if ctx.needs_input_grad[0] else None
        buffer_CV = h_ND.new_empty(min(chunk, len(h_ND)), len(weight_VD))
        for start in range(0, len(h_ND), chunk):
            part = slice(start, min(start + chunk, len(h_ND)))
            logits_CV = torch.mm(h_ND[part], weight_VD.t(), out=buffer_CV[: part.stop - part.start])
            if bias_V is not None:
                logits_CV += bias_V
            wide_CV = at_least_float32(logits_CV)
            targets_CK = wide_CV.gather(1, targets_NK[part])
            top_C1 = wide_CV.amax(dim=1, keepdim=True)
            exp_CV = wide_CV.sub_(top_C1).exp_()
            sum_C1 = exp_CV.sum(dim=1, keepdim=True)
            logprobs_NK[part] = targets_CK - (top_C1 + sum_C1.log())
            if mean_ND is not None:
                if exp_CV.dtype != h_ND.dtype:
                    exp_CV, sum_C1 = exp_CV.div_(sum_C1).to(h_ND.dtype), torch.ones_like(sum_C1)
                torch.mm(exp_CV, weight_VD, out=mean_ND[part])
                mean_ND[part] /= sum_C1
        ctx.save_for_backward(mean_ND, weight_VD, targets_NK)
        return logprobs_NK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_NK: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        mean_ND, weight_VD, targets_NK = ctx.saved_tensors
        dh_ND = at_least_float32(mean_ND) * -g_NK.sum(dim=1, keepdim=True)
        for k in range(targets_NK.shape[1]):  # one alternative at a time: N x D, not N x K x D
            dh_ND += g_NK[:, k, None] * weight_VD[targets_NK[:, k]]
        return dh_ND.to(mean_ND.dtype), None, None, None, None


def chunked_log_probabilities(
    h_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, targets_NK: torch.Tensor
) -> torch.Tensor:
    """Log-probability of each alternative of each target, at least float32 [N, K]; differentiable in ``h_ND`` once.

    Args:
        h_ND, weight_VD, bias_V: as for ``chunked_cross_entropy``.
        targets_NK: token ids, all valid.
    """
    chunk = max(FEWEST, CHUNK_BYTES // (4 * len(weight_VD)))
    logprobs_NK: torch.Tensor = cast(Any, _ChunkedLogProbs).apply(h_ND, weight_VD, bias_V, targets_NK, chunk)
    return logprobs_NK

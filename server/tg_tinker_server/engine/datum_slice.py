"""The losses of the datums in one run through the model, and where its backward pass starts.

The model gives log-probabilities; each datum's loss is a function of its own, on the processor; its derivative is
what the backward pass through the model begins with. So a loss can neither reach another datum nor the model.

Shape suffixes: N datums, T tokens, M positions of all of them, K most alternatives of a position.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from tg_tinker_server.engine.loss_fns import autograd
from tg_tinker_server.engine.loss_fns.values import DatumLoss
from tg_tinker_server.engine.losses import Targets
from tg_tinker_server.engine.pass_rows import DatumRows

if TYPE_CHECKING:
    from tg_tinker_server.engine.torch_pass import TorchPass


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DatumLosses:
    """What one slice found.

    Attributes:
        losses: of each datum.
        logprobs: of each datum's targets, float32 in the shape of ``target_tokens``.
        all_MK: the model's log-probabilities, on its device; columns beyond a datum's own alternatives mean nothing.
        counts: positions of each datum.
    """

    losses: list[DatumLoss]
    logprobs: list[npt.NDArray[np.float32]]
    all_MK: torch.Tensor  # noqa: N815 - shape suffix
    counts: list[int]

    def start(self, scales: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
        """Where a backward pass starts, and with what: the derivatives, those of datum n times ``scales[n]``."""
        slope_MK = np.zeros(tuple(self.all_MK.shape))
        ends = list(itertools.accumulate(self.counts))
        for loss, scale, begin, end in zip(self.losses, scales, [0, *ends], ends, strict=False):
            assert loss.slope is not None
            slope_NK = loss.slope.reshape(end - begin, -1)
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite stays so
                slope_MK[begin:end, : slope_NK.shape[1]] = slope_NK * scale
        return self.all_MK, torch.from_numpy(slope_MK).to(self.all_MK)


def datum_losses(passes: Sequence[TorchPass], width: int, *, masked: bool) -> DatumLosses:
    """Run the next slice of passes on datums through the model and their losses.

    Args:
        passes: whose rows go through together.
        width: columns.
        masked: whether the model is given the mask.
    """
    first = passes[0]
    device = first.session.device
    rows = [(p, p.rows) for p in passes]
    parts = [r.tokens(p.index, width) for p, r in rows]
    ids_NT, mask_NT = (torch.from_numpy(np.concatenate(arrays)).to(device) for arrays in zip(*parts, strict=True))
    targets = [t for p, r in rows if isinstance(r, DatumRows) for t in r.targets(p.index)]
    counts = [len(t) for t in targets]
    token_MK = np.zeros((sum(counts), max(t.shape[1] for t in targets)), dtype=np.int64)
    for t, end in zip(targets, itertools.accumulate(counts), strict=True):
        token_MK[end - len(t) : end, : t.shape[1]] = t
    of_all = Targets(
        row_N=torch.from_numpy(np.repeat(np.arange(len(counts)), counts)).to(device),
        position_N=torch.from_numpy(np.concatenate([np.arange(n) for n in counts])).to(device),
        token_N=torch.from_numpy(token_MK).to(device),
    )
    all_MK = first.session.lm.logprobs(ids_NT, mask_NT if masked else None, of_all)
    values_MK = all_MK.detach().cpu().numpy()
    losses: list[DatumLoss] = []
    logprobs: list[npt.NDArray[np.float32]] = []
    start = 0
    for one, r in rows:
        assert isinstance(r, DatumRows)
        for datum in one.index:
            inputs = r.request.inputs[datum]
            shape = inputs["target_tokens"].shape
            alternatives = 1 if len(shape) == 1 else shape[1]
            own = values_MK[start : start + shape[0], :alternatives].reshape(shape)
            start += shape[0]
            logprobs.append(own.astype(np.float32))
            losses.append(
                autograd.evaluate(r.request.loss, own, inputs, train=r.request.train, graph=r.request.graph)
            )
    return DatumLosses(losses=losses, logprobs=logprobs, all_MK=all_MK, counts=counts)

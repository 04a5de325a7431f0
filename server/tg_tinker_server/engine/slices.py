"""One run through the model: a micro-batch of one pass, or of several whose adapters lie on the same base.

Shape suffixes: N records, T tokens, P parameters, W columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from tg_tinker_server.engine.datum_slice import DatumLosses, datum_losses
from tg_tinker_server.engine.grad_rows import GradRows
from tg_tinker_server.engine.losses import RecordLosses
from tg_tinker_server.engine.pass_rows import BatchRows
from tg_tinker_server.engine.session_core import derived_seed

if TYPE_CHECKING:
    from tg_tinker_server.engine.torch_pass import TorchPass

Gradients = list[torch.Tensor | None]
SliceLosses = RecordLosses | DatumLosses


def run_slice(passes: Sequence[TorchPass]) -> None:
    """Compute the next slice of each pass and fold it in. On an exception no pass has moved.

    Rows never meet: every operation of the model is per row (the probe made sure), a row's adapter is its own, and
    each pass gets back the rows it brought. So a row that is not finite stays with its owner.
    """
    first = passes[0].session
    counts = [len(p.index) for p in passes]
    with _mode(passes):
        if not passes[0].request.train:
            with first.base.computing(*(p.session.adapter for p in passes), counts=tuple(counts)):
                losses = _losses(passes)
                gradients: Gradients = [None] * len(passes)
        elif first.private or len(passes) > 1:
            losses, gradients = _per_sample(passes, counts)
        else:
            losses, gradients = _summed(passes[0])
        parts = [one.part(gradient) for one, gradient in zip(passes, gradients, strict=True)]
    ends = list(itertools.accumulate(counts))
    for one, start, end, part in zip(passes, [0, *ends], ends, parts, strict=False):
        one.fold(losses, slice(start, end), part)


@contextmanager
def _mode(passes: Sequence[TorchPass]) -> Iterator[None]:
    """Training or evaluation, random numbers under the pass's own seed; whatever happens, no trace is left."""
    one = passes[0]
    session = one.session
    if not one.request.train:
        with torch.no_grad():
            yield
        return
    session.base.set_checkpointing(session.checkpoints)
    try:
        with torch.enable_grad(), _randomness(one), session.base.training(session.random or session.checkpoints):
            yield
    finally:
        for each in passes:
            each.session.forget_gradients()


@contextmanager
def _randomness(one: TorchPass) -> Iterator[None]:
    """The global generator under the seed of this slice, and afterwards as it was; nothing if nobody draws."""
    if not one.session.random:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(*one.session.seeds, one.request.seed, one.slice_number))
        yield


def _losses(passes: Sequence[TorchPass]) -> SliceLosses:
    session = passes[0].session
    width = max(p.width for p in passes)
    masked = not session.lm.shortcuts.maskless or any(p.needs_mask() for p in passes)
    if passes[0].of_datums:
        return datum_losses(passes, width, masked=masked)
    parts = [(*r.tokens(p.index, width), r.labels(p.index, width)) for p, r in _batches(passes)]
    ids_NT, mask_NT, labels_NT = (
        torch.from_numpy(np.ascontiguousarray(np.concatenate(arrays))).to(session.device)
        for arrays in zip(*parts, strict=True)
    )
    return session.lm.losses(ids_NT, mask_NT if masked else None, labels_NT)


def _batches(passes: Sequence[TorchPass]) -> Iterator[tuple[TorchPass, BatchRows]]:
    for one in passes:
        assert isinstance(one.rows, BatchRows), "passes on batches and on datums do not share a slice"
        yield one, one.rows


def _per_sample(passes: Sequence[TorchPass], counts: Sequence[int]) -> tuple[SliceLosses, Gradients]:
    """A backward pass that leaves per-sample gradients; without privacy they are summed for each pass."""
    session = passes[0].session
    adapters = [p.session.adapter for p in passes]
    with (
        session.recording(sum(counts), joined=len(passes) > 1) as rows,
        session.base.computing(*adapters, counts=tuple(counts), grads=rows),
    ):
        losses = _losses(passes)
        scales = [s for p, n in zip(passes, counts, strict=True) for s in [p.session.scale] * n]
        _backward(losses, scales, rows)
    gradients: Gradients = []
    start = 0
    for one, count in zip(passes, counts, strict=True):
        own_NW = rows.matrix_NW[start : start + count]
        gradients.append(own_NW if one.session.private else rows.columns.flat(own_NW.sum(dim=0)))
        start += count
    return losses, gradients


def _backward(losses: SliceLosses, scales: Sequence[float], rows: GradRows) -> None:
    start = losses.start(scales)
    if start is None:
        rows.zero()
    elif start[0].requires_grad:  # otherwise nothing trained was reached, which is found out by what is missing
        torch.autograd.backward(*start)


def _summed(one: TorchPass) -> tuple[SliceLosses, Gradients]:
    """An ordinary backward pass: the sum over records."""
    session = one.session
    with session.base.computing(session.adapter):
        losses = _losses([one])
        parameters = list(session.parameters.values())
        start = losses.start([session.scale] * len(one.index))
        grads: Sequence[torch.Tensor | None] = [None] * len(parameters)
        if start is not None:
            grads = torch.autograd.grad(start[0], parameters, start[1], allow_unused=True)
    parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
    return losses, [torch.cat([g.reshape(-1).float() for g in parts])]

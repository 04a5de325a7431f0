"""One forward_backward on a transformers model, in slices of one micro-batch that other runs' rows may join.

A micro-batch is folded into the pass's own sum right after its backward pass, so memory does not grow with the batch.

Shape suffixes: B records of the call, N records of a slice, T tokens, P parameters, W columns.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from tg_tinker.errors import DPUnsupportedError
from tg_tinker_server.engine.backend import Ints, LossRequest, Pass, PassResult, Request
from tg_tinker_server.engine.datum_slice import DatumLosses
from tg_tinker_server.engine.dp_optimizer import ClippedRows
from tg_tinker_server.engine.gradients import Floats, Form, GradientContribution
from tg_tinker_server.engine.loss_fns.values import JUMPS, DatumLoss, joined_metrics, total
from tg_tinker_server.engine.losses import RecordLosses
from tg_tinker_server.engine.microbatch import joins, plan, rung
from tg_tinker_server.engine.pass_rows import DatumRows, rows_of
from tg_tinker_server.engine.requests import units_of
from tg_tinker_server.engine.session_core import ensure_finite_pass
from tg_tinker_server.engine.slices import run_slice

if TYPE_CHECKING:
    from tg_tinker_server.engine.torch_session import TorchSession


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """What one slice adds to its pass.

    Attributes:
        sum_P: to the sum, float64 or float32.
        open_W: the raw sum so far of a unit that goes on in the next slice.
        clipped: the units that are complete.
    """

    sum_P: torch.Tensor | None = None  # noqa: N815 - shape suffix
    open_W: torch.Tensor | None = None  # noqa: N815
    clipped: ClippedRows | None = None


class TorchPass:
    """See ``backend.Pass``.

    Args:
        session: whose weights and settings it uses; it has one pass under way at a time.
        request: checked already.
    """

    def __init__(self, session: TorchSession, request: Request) -> None:
        self.session = session
        self.request = request
        self._units, self._unit_of_B = units_of(request)
        self.rows = rows_of(request)
        self._lengths_B, self._masked_B = self.rows.lengths_B, self.rows.masked_B
        limits = session.limits(train=request.train)
        kind_of_B = None
        if session.private:
            self._lengths_B, self._masked_B = self._alike_whoever_is_beside()
            kind_of_B = 2 * self._lengths_B + self._masked_B
            if self._alone():
                kind_of_B = self._unit_of_B
        # Only the clip needs the records of a unit together.
        together_B = self._unit_of_B if session.private else np.arange(len(self._unit_of_B))
        self._batches = plan(
            self._lengths_B, together_B, max_tokens=limits.tokens, max_records=limits.records, kind_of_B=kind_of_B
        )
        self._next = 0
        records = len(self._unit_of_B)
        self._means_B, self._sums_B, self._targets_B = (np.zeros(records) for _ in range(3))
        self._datums: dict[int, tuple[DatumLoss, npt.NDArray[np.float32]]] = {}
        self._sum_P = torch.zeros(0, dtype=torch.float64)
        # The raw sum of a unit too large for one slice, until its last one.
        self._open_W: torch.Tensor | None = None
        self._folded: list[int] = []
        self._norms: list[Floats] = []
        self._kept: list[npt.NDArray[Any]] = []

    def _alike_whoever_is_beside(self) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """Width and need of a mask for each record, the same for all of a unit and decided by that unit alone.

        How a record is rounded depends on both. So no unit may decide them for another (docs/how-dp-lora-works.md).
        """
        widths_B, masked_B = np.zeros_like(self._lengths_B), np.zeros_like(self._masked_B)
        for unit in range(len(self._units)):
            own = self._unit_of_B == unit
            widths_B[own] = rung(int(self._lengths_B[own].max()), self.session.max_positions)
            masked_B[own] = self._masked_B[own].any()
        return widths_B, masked_B

    def _alone(self) -> bool:
        """Whether a unit shares a slice with nobody, so that no neighbour decides how it is rounded.

        Rounding moves a gradient by rounding, except where a loss has a derivative that jumps.
        """
        return self.session.private and isinstance(self.request, LossRequest) and self.request.loss.name in JUMPS

    @property
    def finished(self) -> bool:
        """See ``backend.Pass``."""
        return self._next == len(self._batches)

    @property
    def of_datums(self) -> bool:
        """Whether its records are datums, with losses of their own."""
        return isinstance(self.rows, DatumRows)

    @property
    def index(self) -> Ints:
        """Records of the next slice [N]."""
        return self._batches[self._next].index

    @property
    def slice_number(self) -> int:
        """How many slices are done."""
        return self._next

    @property
    def width(self) -> int:
        """Columns that the next slice needs."""
        return int(self._lengths_B[self.index].max())

    @property
    def share_key(self) -> Hashable | None:
        """Passes with equal keys can go through the model together; ``None`` goes alone."""
        key = None if self._alone() else self.session.share_key
        return None if key is None else (key, self.request.train, self.session.private, self.of_datums)

    def advance(self, others: Sequence[Pass] = ()) -> list[Pass]:
        """See ``backend.Pass``."""
        self.session.ensure_open()
        joined, before = self._joined(others), self._next
        try:
            run_slice([self, *joined])
        except Exception as e:
            if not joined:
                raise
            if isinstance(e, DPUnsupportedError | torch.OutOfMemoryError | MemoryError):
                self.session.go_alone()
            joined = []
        else:
            return list(joined)
        # Whoever is at fault, it is not the others' loss. What the attempt held is free by now.
        if self._next == before:
            run_slice([self])
        return []

    def _joined(self, others: Sequence[Pass]) -> list[TorchPass]:
        """Those of ``others`` whose next slice fits beside this one."""
        key, limits = self.share_key, self.session.limits(train=self.request.train)
        if key is None:
            return []
        joined: list[TorchPass] = []
        shapes, sessions = [(len(self.index), self.width)], {id(self.session)}
        for other in others:
            if not isinstance(other, TorchPass) or other.finished or other.share_key != key:
                continue
            shape = (len(other.index), other.width)
            # Not even a neighbour run may decide how a private record is rounded.
            alike = not self.session.private or self.needs_mask() == other.needs_mask()
            fits = joins(shapes, shape, limits, same_width=self.session.private)
            if id(other.session) in sessions or other.session.closed or not alike or not fits:
                continue
            joined.append(other)
            shapes.append(shape)
            sessions.add(id(other.session))
        return joined

    def needs_mask(self) -> bool:
        """Whether the next slice has masked tokens that a later one could see, or that predict something."""
        return bool(self._masked_B[self.index].any())

    def part(self, gradient: torch.Tensor | None) -> Part | None:
        """What the next slice will add. Changes nothing yet.

        Args:
            gradient: per-sample rows [N, W] under privacy, else their sum [P] in the layout's order.
        """
        if gradient is None:
            return None
        clipper = self.session.clipper
        if clipper is None:
            return Part(sum_P=gradient / self.session.scale)
        batch = self._batches[self._next]
        unit_of_N = self._unit_of_B[batch.index]
        if not batch.closes or self._open_W is not None:
            total_W = gradient.sum(dim=0, dtype=torch.float64)
            total_W = total_W if self._open_W is None else self._open_W + total_W
            if not batch.closes:
                return Part(open_W=total_W)
            gradient, unit_of_N = total_W.to(gradient.dtype)[None], unit_of_N[:1]
        clipped = clipper.clip_and_sum(gradient, unit_of_N, scale=self.session.scale)
        return Part(sum_P=clipped.sum_P, clipped=clipped)

    def fold(self, losses: RecordLosses | DatumLosses, rows: slice, part: Part | None) -> None:
        """Take in the next slice: ``rows`` of its losses and what ``part`` returned."""
        index = self.index
        if isinstance(losses, DatumLosses):
            found = zip(losses.losses[rows], losses.logprobs[rows], strict=True)
            self._datums.update(zip(index.tolist(), found, strict=True))
        else:
            self._means_B[index], self._sums_B[index], self._targets_B[index] = (
                values_B[rows].detach().cpu().numpy() for values_B in (losses.mean_B, losses.sum_B, losses.targets_B)
            )
        if part is not None:
            if part.sum_P is not None and len(self._sum_P):
                self._sum_P += part.sum_P
            elif part.sum_P is not None:
                self._sum_P = part.sum_P.double()
            self._open_W = part.open_W
            if part.clipped is not None:
                self._folded.extend(part.clipped.units)
                self._norms.append(part.clipped.norms_U)
                if part.clipped.grads_UP is not None:
                    self._kept.append(part.clipped.grads_UP)
        self._next += 1

    def result(self) -> PassResult:
        """See ``backend.Pass``."""
        assert self.finished, "the pass is not finished"
        if self.of_datums:
            return self._result_of_datums()
        records = len(self._unit_of_B)
        contribution = self._contribution() if self.request.train else None
        loss = math.fsum(self._means_B) / max(1, records)
        if not self.session.private:
            ensure_finite_pass(loss, contribution.sum_P if contribution else None)
        return PassResult(
            loss=loss,
            loss_sum=math.fsum(self._sums_B),
            num_targets=int(self._targets_B.sum()),
            num_tokens=self.rows.num_tokens,
            num_records=records,
            contribution=contribution,
        )

    def _result_of_datums(self) -> PassResult:
        found = [self._datums[i] for i in range(len(self._unit_of_B))]
        losses = [loss for loss, _ in found]
        logprobs = tuple(own for _, own in found)
        contribution = self._contribution() if self.request.train else None
        loss_sum = total([loss.value for loss in losses])
        if not self.session.private:
            ensure_finite_pass(loss_sum, contribution.sum_P if contribution else None)
        return PassResult(
            loss=loss_sum,
            loss_sum=loss_sum,
            num_targets=sum(own.size for own in logprobs),
            num_tokens=self.rows.num_tokens,
            num_records=len(found),
            contribution=contribution,
            logprobs=logprobs,
            metrics=joined_metrics(losses),
        )

    def _contribution(self) -> GradientContribution:
        layout = self.session.layout
        sum_P: Floats = self._sum_P.cpu().numpy() if len(self._sum_P) else np.zeros(layout.size)
        form: Form = "sum" if self.of_datums else "mean"
        records = len(self._unit_of_B)
        if not self.session.private:
            return GradientContribution(layout=layout, num_records=records, sum_P=sum_P, private=False, form=form)
        empty = np.zeros((0, layout.size), dtype=np.float32)
        return GradientContribution(
            layout=layout,
            units=tuple(self._units[i] for i in self._folded),
            num_records=records,
            sum_P=sum_P,
            norms_U=np.concatenate([np.zeros(0), *self._norms]),
            grads_UP=np.concatenate([empty, *self._kept]) if self.session.keeps_units else None,
            private=True,
            form=form,
        )

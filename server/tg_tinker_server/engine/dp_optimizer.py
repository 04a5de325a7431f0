"""Opacus's DPOptimizer with the rules of the privacy document: clip per unit, pay for noise, public divisor.

What changes against Opacus: records of one unit are summed before the one clip; norms have a bounded error and a
margin for it; the sum does not lose precision with the number of units; a unit with a non-finite
gradient contributes zero instead of turning the sum NaN; noise comes from the mechanism that the ledger paid for,
never from the global generator; the divisor does not depend on the number of calls.

Shape suffixes: N records, U units, P parameters, W columns of the per-sample matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from opacus.optimizers import DPOptimizer

from tg_tinker_server.dp.clipping import MARGIN_32, MARGIN_64, clip_factors
from tg_tinker_server.engine.backend import Ints
from tg_tinker_server.engine.grad_rows import Columns, row_norms
from tg_tinker_server.engine.gradients import Floats

ROWS_AT_ONCE = 8
_SMALL_BOUND = 1e-12
"""Below it float32 squares of gradients near the bound would vanish."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ClippedRows:
    """The clipped sum of one micro-batch.

    Attributes:
        units: positions of the units that were summed.
        norms_U: their norms before clipping.
        sum_P: sum of the clipped units, float64, in the layout's order.
        grads_UP: each unit's own gradient, where units may be merged over calls.
    """

    units: list[int]
    norms_U: Floats  # noqa: N815 - shape suffix
    sum_P: torch.Tensor  # noqa: N815
    grads_UP: np.ndarray[Any, Any] | None = None  # noqa: N815


class UnitClippingOptimizer(DPOptimizer):  # type: ignore[misc]
    """Clips and sums per-sample gradients; steps with a gradient that was released.

    Args:
        optimizer: the torch optimizer to step.
        columns: where each parameter lies in the per-sample matrix.
        max_grad_norm: L2 bound on one unit, in gradient units.
        expected_batch_size: the public divisor; the release has it applied.
        keep_units: keep each unit's own gradient, for merging over calls.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        columns: Columns,
        max_grad_norm: float,
        expected_batch_size: int,
        keep_units: bool,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=0.0,  # its own noise is closed below
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
        )
        self._columns = columns
        self._keep_units = keep_units

    def clip_and_sum(self, grads_NW: torch.Tensor, unit_of_N: Ints, *, scale: float = 1.0) -> ClippedRows:
        """Clip the units of one micro-batch and sum them.

        Guarantees, for any input: what one unit adds has L2 norm at most ``max_grad_norm``, in float32 too; a unit
        whose gradient is not finite adds exactly zero.

        Args:
            grads_NW: per-sample gradients, at least float32.
            unit_of_N: each record's unit; all records of a unit are here.
            scale: the loss was multiplied by this; norms are those without it.
        """
        units, local_N = np.unique(unit_of_N, return_inverse=True)
        grads_UW = _sum_by_unit(grads_NW, local_N, len(units))
        exact = self.max_grad_norm < _SMALL_BOUND
        norms_U = row_norms(grads_UW, exact=exact).cpu().numpy() / scale
        finite_U = np.isfinite(norms_U)
        margin = MARGIN_64 if grads_UW.dtype == torch.float64 else MARGIN_32
        factors_U = torch.from_numpy(clip_factors(norms_U, max_grad_norm=self.max_grad_norm, margin=margin) / scale)
        kept_UW = grads_UW
        if not finite_U.all():
            chosen = torch.from_numpy(np.flatnonzero(finite_U))
            kept_UW, factors_U = grads_UW[chosen.to(grads_UW.device)], factors_U[chosen]
        dtype = torch.float64 if exact else kept_UW.dtype
        sum_W = _weighted_sum(factors_U.to(device=kept_UW.device, dtype=dtype), kept_UW.to(dtype))
        own = None
        if self._keep_units:
            own = (self._columns.flat(grads_UW) / scale).cpu().numpy()
        return ClippedRows(units=units.tolist(), norms_U=norms_U, sum_P=self._columns.flat(sum_W), grads_UP=own)

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:  # noqa: ARG002 - Opacus's signature
        """Nothing is left to clip or to noise: ``p.grad`` holds the released mean when ``step`` is called."""
        return True

    def add_noise(self) -> NoReturn:
        """Closed: Opacus draws from the global generator, which a user's seed reaches."""
        raise RuntimeError("noise comes from the mechanism the ledger paid for, through PendingBatch.release")

    def scale_grad(self) -> NoReturn:
        """Closed: Opacus divides by the number of calls as well."""
        raise RuntimeError("the divisor is applied in PendingBatch.release")


def _weighted_sum(factors_U: torch.Tensor, rows_UW: torch.Tensor) -> torch.Tensor:
    """factors @ rows, float64 [W].

    A float32 sum over U equal rows is off by up to U^2 2^-24 of one row, and one row more changes it all. So float32
    adds ``ROWS_AT_ONCE`` rows at a time, and float64 the rest.
    """
    total_W = (factors_U[:ROWS_AT_ONCE] @ rows_UW[:ROWS_AT_ONCE]).double()
    for start in range(ROWS_AT_ONCE, len(rows_UW), ROWS_AT_ONCE):
        some = slice(start, start + ROWS_AT_ONCE)
        total_W += factors_U[some] @ rows_UW[some]
    return total_W


def _sum_by_unit(grads_NW: torch.Tensor, local_N: np.ndarray[Any, Any], units: int) -> torch.Tensor:
    """Sum the rows of each unit; rows that are units already stay as they are."""
    if units == len(local_N) and (local_N == np.arange(units)).all():
        return grads_NW
    index = torch.from_numpy(local_N).to(grads_NW.device)
    return grads_NW.new_zeros((units, grads_NW.shape[1])).index_add_(0, index, grads_NW)

"""Opacus's DPOptimizer with the rules of the privacy document: clip per unit, pay for noise, public divisor.

What changes against Opacus: records of one unit are summed before the one clip; norms, factors and sums are float64
with a rounding margin (its 1e-6 in the denominator is none at large norms in half precision); a unit with a
non-finite gradient contributes zero instead of turning the sum NaN; noise comes from the mechanism that the ledger
paid for, never from the global generator; the divisor does not depend on the number of calls.

Shape suffixes: B records, U units, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from opacus.optimizers import DPOptimizer

from tg_tinker_server.dp.clipping import clip_factors
from tg_tinker_server.engine.backend import Ints
from tg_tinker_server.engine.gradients import Floats, GradientContribution, ParamLayout


class UnitClippingOptimizer(DPOptimizer):  # type: ignore[misc]
    """Clips and sums per-sample gradients call by call; steps with a gradient that was released.

    Args:
        optimizer: the torch optimizer to step.
        layout: names and shapes of its parameters, in its order.
        max_grad_norm: L2 bound on one unit, in gradient units.
        expected_batch_size: the public divisor; the release has it applied.
        keep_units: keep each unit's own gradient, for merging over calls.
        apply: how to step with a given gradient, all or nothing.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        layout: ParamLayout,
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
        self._layout = layout
        self._keep_units = keep_units
        self._begin()

    def _begin(self) -> None:
        self._sum_P: torch.Tensor | None = None
        self._records = 0
        self._units: list[int] = []
        self._norms: list[Floats] = []
        self._kept: list[np.ndarray[Any, Any]] = []

    def clip_and_accumulate(
        self, grads_B: Mapping[str, torch.Tensor], unit_of_B: Ints, *, scale: float = 1.0
    ) -> None:
        """Clip the units of one micro-batch and add them to the sum of this call.

        Args:
            grads_B: per-sample gradients [B, ...] by parameter name, in the layout's order.
            unit_of_B: each record's unit; all records of a unit are here.
            scale: the loss was multiplied by this; norms are those without it.
        """
        units, local_B = np.unique(unit_of_B, return_inverse=True)
        grads_U = [_sum_by_unit(g, local_B, len(units)).flatten(1) for g in grads_B.values()]
        squares_U = torch.stack([torch.linalg.vector_norm(g, dim=1, dtype=torch.float64) for g in grads_U])
        norms_U = torch.linalg.vector_norm(squares_U, dim=0).cpu().numpy() / scale
        factors_U = torch.from_numpy(clip_factors(norms_U, max_grad_norm=self.max_grad_norm) / scale)
        finite_U = torch.from_numpy(np.isfinite(norms_U))
        device = grads_U[0].device
        factors_U, finite_U = factors_U[finite_U].to(device), finite_U.to(device)
        every = bool(finite_U.all())
        parts = [factors_U @ (g if every else g[finite_U]).double() for g in grads_U]
        sum_P = torch.cat(parts)
        self._sum_P = sum_P if self._sum_P is None else self._sum_P + sum_P
        self._records += len(unit_of_B)
        self._units.extend(units.tolist())
        self._norms.append(norms_U)
        if self._keep_units:
            self._kept.append((torch.cat(grads_U, dim=1) / scale).float().cpu().numpy())

    def take(self, units: Sequence[str]) -> GradientContribution:
        """The contribution of the call whose micro-batches were folded, and begin the next.

        Args:
            units: names of the units, by the positions used in ``clip_and_accumulate``.
        """
        size = self._layout.size
        contribution = GradientContribution(
            layout=self._layout,
            units=tuple(units[i] for i in self._units),
            num_records=self._records,
            sum_P=np.zeros(size) if self._sum_P is None else self._sum_P.cpu().numpy(),
            norms_U=np.concatenate(self._norms) if self._norms else np.zeros(0),
            grads_UP=(np.concatenate(self._kept) if self._kept else np.zeros((0, size), dtype=np.float32))
            if self._keep_units
            else None,
            private=True,
        )
        self._begin()
        return contribution

    def reset(self) -> None:
        """Forget a call that failed half-way."""
        self._begin()

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:  # noqa: ARG002 - Opacus's signature
        """Nothing is left to clip or to noise: ``p.grad`` holds the released mean when ``step`` is called."""
        return True

    def add_noise(self) -> NoReturn:
        """Closed: Opacus draws from the global generator, which a user's seed reaches."""
        raise RuntimeError("noise comes from the mechanism the ledger paid for, through PendingBatch.release")

    def scale_grad(self) -> NoReturn:
        """Closed: Opacus divides by the number of calls as well."""
        raise RuntimeError("the divisor is applied in PendingBatch.release")


def _sum_by_unit(grads: torch.Tensor, local_B: np.ndarray[Any, Any], units: int) -> torch.Tensor:
    """Sum the rows of each unit in float64; rows that are units already stay as they are, reordered."""
    if units == len(local_B) and (local_B == np.arange(units)).all():
        return grads
    index = torch.from_numpy(local_B).to(grads.device)
    out = torch.zeros((units, *grads.shape[1:]), dtype=torch.float64, device=grads.device)
    return out.index_add_(0, index, grads.double())

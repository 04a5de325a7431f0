"""One logical batch: every contribution since the last step, and how it becomes one gradient.

Shape suffixes: U units, P parameters.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker.types import TrainingConfig
from tg_tinker_server.dp.clipping import clip_and_sum, norm_stats
from tg_tinker_server.engine.backend import Contribution, StepRequest, StepResult
from tg_tinker_server.engine.gradients import Floats, Form, GradientContribution, ParamLayout
from tg_tinker_server.engine.requests import UNNAMED, naming_of

MAX_MERGED_BYTES = 2 * 2**30
"""Gradients that all batches of this process keep for each unit, together."""
_batches: weakref.WeakSet[PendingBatch] = weakref.WeakSet()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Release:
    """What leaves the engine's private half: the (noised, globally clipped) mean gradient and its figures."""

    grad_P: npt.NDArray[np.float32]  # noqa: N815 - shape suffix
    result: StepResult


class PendingBatch:
    """The contributions of one session since its last step.

    Under differential privacy a unit enters once per logical batch: a second contribution of it is refused, or,
    with ``merge_units``, added to the first before the one clip. Units that are known by their content are never
    merged: equal content in two calls may be of two people, and one clip would bound neither.
    """

    def __init__(self, layout: ParamLayout, config: TrainingConfig) -> None:
        self._layout = layout
        self._dp = config.dp_config if config.private else None
        self._expected_batch_size = config.expected_batch_size
        self.clear()
        _batches.add(self)

    def clear(self) -> None:
        """Forget everything."""
        self.calls = 0
        self._form: Form | None = None
        self._records = 0
        self._sum_P: Floats = np.zeros(self._layout.size)
        self._norms: list[Floats] = []
        self._units: dict[str, None] = {}
        self._merged: dict[str, Floats] = {}

    @property
    def units(self) -> tuple[str, ...]:
        """Privacy units in the batch, in order of arrival."""
        return tuple(self._units)

    @property
    def merged_bytes(self) -> int:
        """Memory of the gradients that are kept for each unit."""
        return 8 * self._layout.size * len(self._merged)

    @property
    def merges(self) -> bool:
        """Whether a unit may come in several calls."""
        return self._dp is not None and self._dp.merge_units

    def add(self, contribution: Contribution) -> None:
        """Add one call's gradient.

        Raises:
            InvalidRequestError: a unit is in the batch already and units are not merged, or the batch holds means
                and this is a sum, or the other way round; nothing is added.
        """
        if not isinstance(contribution, GradientContribution) or contribution.layout is not self._layout:
            raise ServerError("a contribution was handed to a session that did not compute it")
        if len(set(contribution.units)) != len(contribution.units):
            raise ServerError("a pass counted a privacy unit twice; it was not accumulated")
        if self._form is not None and self._form != contribution.form:
            raise InvalidRequestError(
                "this logical batch would hold batches, whose gradients are averaged over records, and datums, "
                "whose gradients are summed; call optim_step in between, or send all of it in one form",
                field="forward_backward",
                constraint="batches or datums, not both, per optim_step",
            )
        self._refuse_half_named(contribution.units)
        if self._dp is not None:
            twice = [u for u in contribution.units if u in self._units and (not self.merges or u.startswith(UNNAMED))]
            if twice:
                merging = "; merge_units merges what somebody named" if self.merges else ""
                raise InvalidRequestError(
                    f"{len(twice)} privacy unit(s) of this batch are already in the logical batch since the last "
                    "optim_step; clipping each call alone would let them count twice. Put all records of a unit "
                    "in one call, step in between, or set DPConfig(merge_units=True). Without privacy_unit_ids equal "
                    f"records are taken for the same one: give ids if they are different{merging}",
                    field="privacy_unit_ids",
                    constraint="each unit in one forward_backward per optim_step",
                )
        if self.merges and contribution.grads_UP is not None:
            size = 8 * self._layout.size * (len(self._merged) + len(contribution.units))
            others = sum(batch.merged_bytes for batch in _batches if batch is not self)
            if size + others > MAX_MERGED_BYTES:
                raise InvalidRequestError(
                    f"merge_units keeps a gradient per unit until the step, here {size >> 20} MiB; beside other runs "
                    f"that is over the {MAX_MERGED_BYTES >> 20} MiB of this server; take smaller logical batches, "
                    "step your other runs, or put all records of a unit in one call without merge_units",
                    field="merge_units",
                    constraint=f"at most {MAX_MERGED_BYTES >> 20} MiB of gradients",
                )
        self.calls += 1
        self._form = contribution.form
        self._records += contribution.num_records
        self._units.update(dict.fromkeys(contribution.units))
        if contribution.grads_UP is not None:
            for unit, grad_P in zip(contribution.units, contribution.grads_UP, strict=True):
                held = self._merged.get(unit)
                with np.errstate(invalid="ignore", over="ignore"):
                    self._merged[unit] = grad_P.astype(np.float64) if held is None else held + grad_P
            return
        self._sum_P += contribution.sum_P
        self._norms.append(contribution.norms_U)

    def _refuse_half_named(self, units: tuple[str, ...]) -> None:
        """Whose a record is must be known for all of a logical batch or for none of it."""
        if self._dp is None or not units or not self._units:
            return
        if len({naming_of(unit) for unit in (units[0], next(iter(self._units)))}) > 1:
            raise InvalidRequestError(
                "some calls of this logical batch name privacy units and others do not, so a unit could count twice; "
                "give privacy_unit_ids in every call, or in none",
                field="privacy_unit_ids",
                constraint="in every call of a logical batch or in none",
            )

    def release(self, request: StepRequest) -> Release:
        """Turn the batch into the gradient of one step. Does not clear it.

        Guarantees, with privacy and a mechanism: adding or removing one unit changes the sum before noise by at
        most ``max_grad_norm`` in L2; the divisor is the public ``expected_batch_size`` whatever was drawn.

        Raises:
            InvalidRequestError: nothing was accumulated.
            ServerError: the mechanism does not belong to this run's settings.
        """
        if self.calls == 0:
            raise InvalidRequestError(
                "optim_step has nothing to apply: no forward_backward in training mode since the last step",
                field="forward_backward",
                constraint="at least one before optim_step",
            )
        if self._dp is None:
            divisor = 1 if self._form == "sum" else self._records
            return self._finish(self._sum_P / divisor, request, norms_U=None)
        bound = self._dp.max_grad_norm
        if self.merges:
            stacked = np.stack(list(self._merged.values())) if self._merged else np.zeros((0, self._layout.size))
            clipped = clip_and_sum(stacked, max_grad_norm=bound)
            total_P, norms_U = clipped.sum_P, clipped.norms_U
        else:
            total_P, norms_U = self._sum_P.copy(), np.concatenate(self._norms)
        if request.mechanism is not None:
            if request.mechanism.max_grad_norm != bound:
                raise ServerError(
                    f"the noise was paid for at max_grad_norm {request.mechanism.max_grad_norm}, "
                    f"but this run clips at {bound}"
                )
            request.mechanism.add_noise_([total_P])
        return self._finish(total_P / self._expected_batch_size, request, norms_U=norms_U)

    def _finish(self, mean_P: Floats, request: StepRequest, norms_U: Floats | None) -> Release:
        if self._dp is None and request.mechanism is not None:
            raise ServerError("noise was handed to a run without differential privacy")
        digest = self._layout.digest(mean_P)
        grad_norm = float(np.linalg.norm(mean_P))
        if request.global_clip is not None and grad_norm > request.global_clip:
            mean_P = mean_P * (request.global_clip / grad_norm)
        nan = float("nan")
        stats = (
            norm_stats(norms_U, max_grad_norm=self._dp.max_grad_norm) if self._dp and norms_U is not None else None
        )
        return Release(
            grad_P=mean_P.astype(np.float32),
            result=StepResult(
                grad_norm=grad_norm,
                norm_before_clip=stats.mean_before if stats else nan,
                norm_after_clip=stats.mean_after if stats else nan,
                num_clipped=stats.num_clipped if stats else 0,
                nonfinite_units=stats.nonfinite if stats else 0,
                update_hash="sha256:" + digest.hex(),
            ),
        )

"""Passes and steps: on batches, on datums, on rows computed elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tg_tinker._arguments import adam_of, datums_of, keyed_units, updates
from tg_tinker._training.base import RunHandle
from tg_tinker.chunking import chunks, combined
from tg_tinker.datasets import Dataset
from tg_tinker.errors import InvalidRequestError
from tg_tinker.futures import FutureHandle
from tg_tinker.types import BatchData
from tg_tinker.types.datum import Datum
from tg_tinker.types.losses import Loss, check_data
from tg_tinker.types.optim import AdamParams
from tg_tinker.wire.calls import LossPass, Pass, Step

Batch = BatchData | Mapping[str, Any]


class Passes(RunHandle):
    """Gradients add up over passes until a step applies them."""

    def forward_backward(
        self,
        batch: Batch | Sequence[Datum] | None = None,
        batch_hash: str | None = None,
        loss_fn_config: Mapping[str, float | str] | None = None,
        *,
        loss_fn: str | None = None,
        data: Sequence[Datum] | None = None,
        privacy_unit_ids: Sequence[str] | None = None,
        dataset: Dataset | str | None = None,
    ) -> FutureHandle:
        """Execute a forward and backward pass; gradients add up until ``optim_step``.

        On a batch: ``forward_backward(batch, batch_hash)``. On datums:
        ``forward_backward(data, loss_fn, loss_fn_config)``; more than 1,024 of them, or 5 MB, travel as several
        requests of one logical batch, with the same result. One logical batch is of one kind.

        Args:
            batch: input_ids, and optionally attention_mask and labels (-100 is ignored), as BatchData or dict; or a
                list of Datum, also as ``data``.
            batch_hash: ``"sha256:..."`` from ``hash_batch`` must match the batch that arrives; any other text is
                a label for the audit log. With datums: the name of the loss, also as ``loss_fn``.
            loss_fn_config: settings of the loss; see ``tg_tinker.types.losses``.
            privacy_unit_ids: whose each record or datum is, for privacy units larger than one. Only keyed hashes of
                them leave this process. Without them equal datums count as one unit when they travel in different
                requests.
            dataset: instead of a batch: a registered dataset, or its id, from which the server draws one. A step
                takes one draw, and nobody learns which records were in it.

        Returns:
            Resolves to a ForwardBackwardResult; of datums ``loss`` is the sum over all, ``loss_fn_outputs`` has one
            entry for each. In eval mode the loss is computed and nothing adds up.

        Raises:
            InvalidRequestError: shapes, keys, inputs or units that cannot be, before anything is sent.
        """
        if data is not None and batch is not None:
            raise InvalidRequestError("give batch or data, not both", field="data", constraint="one of both")
        given = data if data is not None else batch
        if dataset is not None:
            return self._submit(
                self._drawn_pass(dataset, given, batch_hash, loss_fn, loss_fn_config, privacy_unit_ids)
            )
        if given is None:
            raise InvalidRequestError(
                "forward_backward needs a batch, or dataset=...", field="batch", constraint="a batch or a dataset"
            )
        if isinstance(given, BatchData | Mapping):
            if loss_fn is not None or loss_fn_config is not None:
                raise InvalidRequestError(
                    "loss_fn is for datums; a batch has the loss of next tokens",
                    field="loss_fn",
                    constraint="a list of Datum",
                )
            return self._submit(self._pass(BatchData.of(given), batch_hash, privacy_unit_ids))
        loss = Loss.of(loss_fn or batch_hash or "cross_entropy", loss_fn_config)
        return self._datum_passes(datums_of(given), loss, train=self._training, privacy_unit_ids=privacy_unit_ids)

    def forward(
        self,
        data: Sequence[Datum],
        loss_fn: str = "cross_entropy",
        loss_fn_config: Mapping[str, float | str] | None = None,
    ) -> FutureHandle:
        """Compute a loss and every target's log-probability; nothing adds up and nothing is drawn for dropout.

        Returns:
            Resolves to a ForwardBackwardOutput, ``loss_fn_outputs`` in the order of ``data``.

        Raises:
            InvalidRequestError: inputs that cannot be, before anything is sent.
        """
        return self._datum_passes(datums_of(data), Loss.of(loss_fn, loss_fn_config), train=False)

    def add_updates(self, vectors: npt.NDArray[np.float32], privacy_unit_ids: Sequence[str]) -> FutureHandle:
        """Add rows that were computed elsewhere; like the gradients of a pass they add up until ``optim_step``.

        For runs with ``model_ref="vector:<P>"``. Under differential privacy the server sums the rows of each unit and
        clips the sum to ``max_grad_norm``; one that is not finite contributes zero. A step moves the run's vector
        against the (noised) sum, divided by the expected batch size, as it does with any gradient.

        Args:
            vectors: float32 [rows, P].
            privacy_unit_ids: whose each row is. Only keyed hashes of them leave this process.

        Returns:
            Resolves to a ForwardBackwardResult whose loss is zero.

        Raises:
            InvalidRequestError: rows or units that cannot be, before anything is sent; or eval mode.
        """
        self._require_training("add_updates")
        return self._submit(updates(self._unit_key, vectors, privacy_unit_ids))

    def optim_step(
        self,
        apply_dp_noise: bool | AdamParams = True,
        *,
        adam_params: AdamParams | None = None,
        optim_params: AdamParams | None = None,
    ) -> FutureHandle:
        """Apply the gradients that added up.

        Args:
            apply_dp_noise: False is refused under differential privacy, unless the run was created for it. AdamParams
                may stand here, too.
            adam_params: settings of this step instead of those of the run and its schedule; also as
                ``optim_params``.

        Returns:
            Resolves to an OptimStepResult.

        Raises:
            InvalidRequestError: the client is in eval mode, or AdamParams are given twice.
        """
        self._require_training("optim_step")
        noise, adam = adam_of(apply_dp_noise, adam_params, optim_params)
        return self._submit(Step(apply_dp_noise=noise, adam=adam))

    def train(self) -> None:
        """Set training mode: passes add up gradients, dropout is on."""
        self._training = True

    def eval(self) -> None:
        """Set evaluation mode: passes compute the loss only. Gradients that added up stay."""
        self._training = False

    # Twins for coroutines: they make the call at once and never block the event loop.

    async def forward_backward_async(
        self,
        batch: Batch | Sequence[Datum] | None = None,
        batch_hash: str | None = None,
        loss_fn_config: Mapping[str, float | str] | None = None,
        **kwargs: Any,
    ) -> FutureHandle:
        """Like ``forward_backward``; await the returned handle for the result."""
        return self.forward_backward(batch, batch_hash, loss_fn_config, **kwargs)

    async def forward_async(
        self,
        data: Sequence[Datum],
        loss_fn: str = "cross_entropy",
        loss_fn_config: Mapping[str, float | str] | None = None,
    ) -> FutureHandle:
        """Like ``forward``; await the returned handle for the result."""
        return self.forward(data, loss_fn, loss_fn_config)

    async def optim_step_async(
        self,
        apply_dp_noise: bool | AdamParams = True,
        *,
        adam_params: AdamParams | None = None,
        optim_params: AdamParams | None = None,
    ) -> FutureHandle:
        """Like ``optim_step``; await the returned handle for the result."""
        return self.optim_step(apply_dp_noise, adam_params=adam_params, optim_params=optim_params)

    def _require_training(self, operation: str) -> None:
        if not self._training:
            raise InvalidRequestError(
                f"{operation} in eval mode; call train() first", field=operation, constraint="train mode"
            )

    def _pass(self, batch: BatchData, batch_hash: str | None, unit_ids: Sequence[str] | None) -> Pass:
        units = None if unit_ids is None else keyed_units(self._unit_key, unit_ids, batch.num_records)
        return Pass(batch=batch, train=self._training, units=units, batch_hash=batch_hash)

    def _datum_passes(
        self,
        data: Sequence[Datum],
        loss: Loss,
        *,
        train: bool,
        privacy_unit_ids: Sequence[str] | None = None,
    ) -> FutureHandle:
        return self._submit_all(self._parts(data, loss, train, privacy_unit_ids), combined)

    def _parts(
        self, data: Sequence[Datum], loss: Loss, train: bool, unit_ids: Sequence[str] | None
    ) -> list[LossPass]:
        check_data(loss, data)
        units = None if unit_ids is None else keyed_units(self._unit_key, unit_ids, len(data))
        return [
            LossPass(
                data=tuple(data[part]), loss=loss, train=train, units=None if units is None else units[part] or None
            )
            for part in chunks(data)
        ]

    def _drawn_pass(self, dataset: Dataset | str, *given: object) -> Pass:
        if any(value is not None for value in given):
            raise InvalidRequestError(
                "the server draws the batch itself; give a batch or a dataset, not both",
                field="dataset",
                constraint="a batch or a dataset",
            )
        if not self._training:
            raise InvalidRequestError(
                "a registered dataset is drawn from for training only; call train() first, or evaluate on a batch",
                field="dataset",
                constraint="train mode",
            )
        dataset_id = dataset.id if isinstance(dataset, Dataset) else dataset
        if not isinstance(dataset_id, str) or not dataset_id:
            raise InvalidRequestError(
                "dataset must be a Dataset or the id of one", field="dataset", constraint="a registered dataset"
            )
        return Pass.drawn_from(dataset_id)

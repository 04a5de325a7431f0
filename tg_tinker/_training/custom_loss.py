"""forward_backward with a loss of one's own, in two passes; or in one, where the server runs the loss."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Literal

from tg_tinker._arguments import datums_of
from tg_tinker._training.passes import Passes
from tg_tinker.chunking import combined
from tg_tinker.custom.linear import Linear, Options, forward_data, linearize, per_datum_loss
from tg_tinker.custom.trace import LossHandle
from tg_tinker.errors import DPUnsupportedError, InvalidRequestError
from tg_tinker.futures import FutureHandle
from tg_tinker.regularizers.pipeline import LossFn
from tg_tinker.regularizers.spec import RegularizerSpec, check
from tg_tinker.types import ForwardBackwardOutput
from tg_tinker.types.datum import Datum
from tg_tinker.types.losses import CUSTOM, Loss

_CROSS_ENTROPY = "cross_entropy"


class CustomLoss(Passes):
    """Losses on log-probabilities; the function never leaves this process, unless it was traced for the server."""

    def forward_backward_custom(
        self,
        data: Sequence[Datum],
        loss_fn: Callable[..., Any] | LossHandle,
        *,
        loss_type_input: str = "logprobs",
        per_datum: bool = False,
        regularizers: Sequence[RegularizerSpec] | None = None,
        track_grad_norms: bool = False,
        parallel: bool = True,
        timeout: float = 30.0,
        max_concurrency: int | None = None,
        allow_external: bool = False,
        privacy_unit_ids: Sequence[str] | None = None,
        privacy_unit: Literal["batch"] | None = None,
    ) -> FutureHandle:
        """Forward and backward with ``loss_fn(data, logprobs)``, to (scalar tensor, metrics). Needs torch.

        A forward pass gives the log-probabilities of ``target_tokens``; the loss is computed here, which this call
        waits for; the backward pass is under way when it returns. Its gradient is exact. When the loss or a
        regularizer fails, it is raised here and nothing is added up.

        Under differential privacy the loss is computed once for each privacy unit, from that unit's data alone, and
        summed: what couples units (a variance over the batch, a contrast between two people) would leak past the
        clipping. Metrics named ``name:reducer`` are reduced over the units, others are means over datums.

        Args:
            data: datums with ``target_tokens``; the others of their inputs are seen by ``loss_fn`` only.
            loss_fn: or a LossHandle of ``create_custom_loss``: then the server runs it, in one pass, unless there are
                regularizers.
            loss_type_input: "logprobs"; there is no other.
            per_datum: ``loss_fn(logprobs, **inputs)`` is called once for each datum, and summed.
            regularizers: added to the loss, each times its weight.
            track_grad_norms: also the norm of each gradient to the log-probabilities, in ``result.custom_loss``.
            parallel, timeout, max_concurrency: see ``tg_tinker.regularizers.compute``.
            allow_external: asynchronous regularizers may see private data: they may send it elsewhere.
            privacy_unit_ids: whose each datum is.
            privacy_unit: "batch" insists on one evaluation over everything, as without privacy; refused with it.

        Returns:
            Resolves to a ForwardBackwardOutput: ``loss:sum`` is the custom loss, ``surrogate_loss:sum`` that of the
            second pass, beside the loss's own metrics; ``custom_loss`` is a CustomLossOutput. In eval mode there is
            no second pass.

        Raises:
            DPUnsupportedError: what would couple privacy units, or take private data elsewhere unasked.
            LossGradientError: (a ValueError) no gradient to the log-probabilities of some datum.
            RegularizerFailedError: naming the regularizer.
        """
        options = Options(
            regularizers=tuple(regularizers or ()),
            track_grad_norms=track_grad_norms,
            parallel=parallel,
            timeout=timeout,
            max_concurrency=max_concurrency,
        )
        self._check_custom(options, loss_type_input, allow_external, privacy_unit)
        given = datums_of(data)
        if isinstance(loss_fn, LossHandle):
            if loss_fn.loss_id and not options.regularizers and not track_grad_norms:
                loss = Loss.of(CUSTOM, {"loss_id": loss_fn.loss_id})
                return self._datum_passes(given, loss, train=self._training, privacy_unit_ids=privacy_unit_ids)
            per_datum = True
        if not given:
            raise InvalidRequestError("there are no datums", field="data", constraint="at least one datum")
        first = self._datum_passes(forward_data(given), Loss.of(_CROSS_ENTROPY), train=False).result()
        linear = linearize(
            given,
            [outputs["logprobs"].to_numpy() for outputs in first.loss_fn_outputs],
            _whole(loss_fn, per_datum),
            options,
            units=self._evaluated_alone(len(given), privacy_unit_ids),
        )
        if not self._training:
            return self._submit_all((), lambda _: _described(first, linear))
        parts = self._parts(linear.data, Loss.of(_CROSS_ENTROPY), True, privacy_unit_ids)
        return self._submit_all(parts, lambda outputs: _described(combined(outputs), linear))

    async def forward_backward_custom_async(
        self, data: Sequence[Datum], loss_fn: Callable[..., Any] | LossHandle, **kwargs: Any
    ) -> FutureHandle:
        """Like ``forward_backward_custom``, on a thread; await the returned handle for the result."""
        return await asyncio.to_thread(self.forward_backward_custom, data, loss_fn, **kwargs)

    def _check_custom(
        self, options: Options, loss_type_input: str, allow_external: bool, privacy_unit: str | None
    ) -> None:
        if loss_type_input != "logprobs":
            raise InvalidRequestError(
                f"a custom loss takes log-probabilities, not {loss_type_input!r}",
                field="loss_type_input",
                constraint="logprobs",
            )
        if privacy_unit not in (None, "batch"):
            raise InvalidRequestError(
                "privacy_unit is 'batch' or left out; the run's own unit is in its configuration",
                field="privacy_unit",
                constraint="batch, or None",
            )
        check(options.regularizers)
        if not self._config.private:
            return
        if privacy_unit == "batch":
            raise DPUnsupportedError(
                "a loss over the whole batch couples privacy units: the gradient of one would depend on the data of "
                "another, and clipping would bound neither",
                feature="privacy_unit='batch'",
                reason="the loss couples privacy units",
                alternative="leave privacy_unit out: the loss is computed for each unit alone and summed",
            )
        outside = [s.name for s in options.regularizers if s.async_]
        if outside and not allow_external:
            raise DPUnsupportedError(
                f"the asynchronous regularizer {outside[0]!r} may send private data elsewhere",
                feature="async regularizers",
                reason="private data would leave this process",
                alternative="allow_external=True, if where it goes may see the data",
            )

    def _evaluated_alone(self, count: int, unit_ids: Sequence[str] | None) -> Sequence[str] | None:
        """Whose each datum is, where the loss must not see two at once; ``None`` without privacy."""
        if not self._config.private:
            return None
        if unit_ids is None:
            return [str(i) for i in range(count)]
        if len(unit_ids) != count:
            raise InvalidRequestError(
                f"{len(unit_ids)} privacy_unit_ids for {count} datums",
                field="privacy_unit_ids",
                constraint="one per record",
            )
        return unit_ids


def _whole(loss_fn: Callable[..., Any], per_datum: bool) -> LossFn:
    return per_datum_loss(loss_fn) if per_datum else loss_fn


def _described(output: ForwardBackwardOutput, linear: Linear) -> ForwardBackwardOutput:
    """The result of the second pass, in the words of the custom loss."""
    surrogate = output.metrics.pop("loss:sum", float("nan"))
    output.metrics.pop("loss:mean", None)  # of the surrogate, which nobody asked about
    output.loss = linear.output.loss_total
    output.metrics |= linear.metrics
    output.metrics |= {"loss:sum": linear.output.loss_total, "surrogate_loss:sum": surrogate}
    output.custom_loss = linear.output
    return output

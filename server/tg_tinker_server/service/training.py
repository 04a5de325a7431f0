"""forward_backward: passes over batches and datums, and the logical batch that they add up to."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tg_tinker.errors import (
    DPBudgetExceededError,
    InvalidRequestError,
    TGTinkerError,
)
from tg_tinker.types import (
    ForwardBackwardOutput,
    batch_digest,
)
from tg_tinker.wire.calls import LossPass, Pass
from tg_tinker_server.config import SharePasses
from tg_tinker_server.engine.backend import (
    LossRequest,
    PassRequest,
    PassResult,
)
from tg_tinker_server.ledger.privacy_ledger import PrivacyLedger
from tg_tinker_server.ledger.reservation import Spent
from tg_tinker_server.service.custom_losses import CustomLosses
from tg_tinker_server.service.datums import check_datums, outputs_of, prepare_datums, tokens_of
from tg_tinker_server.service.draws import DrawService, require_drawable
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.service.fitting import PassLimits
from tg_tinker_server.service.lanes import Operation
from tg_tinker_server.service.pass_checks import (
    check_batch,
    check_units,
    refuse_if_drawn_here,
    refuse_mixture,
    refuse_too_many,
)
from tg_tinker_server.service.passes import PassQueue, sharing_group
from tg_tinker_server.service.run import ACTIVE, PrivateRun, Run

LARGE_BATCH = 1 << 12  # tokens with padding from which preparing a batch leaves the event loop


@dataclass(frozen=True, slots=True)
class TrainingService:
    """Adds to a run's logical batch, or only evaluates, inside the run's lane. `StepService` makes the step."""

    ledger: PrivacyLedger
    executors: Executors
    passes: PassQueue
    draws: DrawService
    losses: CustomLosses
    share_passes: SharePasses
    limits: PassLimits

    async def forward_backward(
        self, run: Run, operation: Operation, request: Pass | LossPass
    ) -> ForwardBackwardOutput:
        """Add one batch to the logical batch, or only evaluate it; or draw the logical batch from a dataset.

        A logical batch is made of batches or of datums: a mean over records and a sum over datums cannot be added.
        """
        run.require_intact()
        if request.train:
            run.require_active()
            refuse_mixture(run, request)
        if isinstance(request, LossPass):
            return await self._forward_backward_datums(run, operation, request)
        if request.dataset_id:
            return await self._draw(run, operation, request)
        check_batch(run, request, self.limits)
        if request.batch.input_ids.size < LARGE_BATCH:
            digest, engine_request = _prepare(run, request)
        else:
            digest, engine_request = await self.executors.io(_prepare, run, request)
        claimed = request.batch_hash or ""
        if claimed.startswith("sha256:") and claimed != "sha256:" + digest.hex():
            raise InvalidRequestError(
                "batch_hash does not match the batch that arrived; compute it with tg_tinker.hash_batch(batch)",
                field="batch_hash",
                constraint="sha256 of this batch",
            )
        if request.train and run.private is not None:
            await self.refuse_if_unaffordable(run, run.private)
        result = await self._pass(run, operation, engine_request)
        return await self._take(run, operation, request, digest, result)

    async def _forward_backward_datums(
        self, run: Run, operation: Operation, request: LossPass
    ) -> ForwardBackwardOutput:
        if request.train:
            refuse_if_drawn_here(run, field="data")
        refuse_too_many(len(request.data), self.limits, "forward_backward", field="data")
        check_datums(run, request, max_tokens=self.limits.max_tokens)
        check_units(run, request, len(request.data))
        graph = await self.losses.graph(run.tenant, request.loss.loss_id) if request.loss.loss_id else ""
        if tokens_of(request.data) < LARGE_BATCH:
            digest, engine_request = prepare_datums(run, request, graph)
        else:
            digest, engine_request = await self.executors.io(prepare_datums, run, request, graph)
        spent: dict[str, float] = {}
        if request.train and run.private is not None:
            await self.refuse_if_unaffordable(run, run.private)
            # Also here, because some scripts log what their passes say and not what their steps say.
            spent = _spent_so_far(await self.executors.io(self.ledger.spent, run.private.scope))
        result = await self._pass(run, operation, engine_request)
        output = await self._take(run, operation, request, digest, result)
        shown = run.private is None or run.private.config.diagnostics == "owner"
        figures = {"loss:sum": result.loss_sum, **result.metrics} if shown else {"loss:sum": math.nan}
        return replace(
            output,
            metrics=figures | spent,
            loss_fn_output_type="ArrayRecord",
            loss_fn_outputs=outputs_of(request, result.logprobs if shown else None),
        )

    async def _take(
        self, run: Run, operation: Operation, request: Pass | LossPass, digest: bytes, result: PassResult
    ) -> ForwardBackwardOutput:
        """Add what a pass computed to the logical batch, if it is for training, and describe it."""
        describing = asyncio.ensure_future(self.describe(run, digest, result, operation))  # hashes on a disk thread
        try:
            if request.train:
                await self.accumulate(run, operation, result)
                run.pending = type(request)
            return await describing
        finally:
            describing.cancel()

    async def _pass(self, run: Run, operation: Operation, request: PassRequest | LossRequest) -> PassResult:
        return await self.passes.run(
            run.session,
            request,
            group=sharing_group(run, self.share_passes),
            ensure_wanted=operation.ensure_wanted,
        )

    async def _draw(self, run: Run, operation: Operation, request: Pass) -> ForwardBackwardOutput:
        """Draw the logical batch from the run's registered dataset. Nothing is charged until it is stepped."""
        private = require_drawable(run, request)
        await self.refuse_if_unaffordable(run, private)
        digest, results, gradients = hashlib.sha256(), list[PassResult](), hashlib.sha256()
        for drawn in await self.draws.draw(run, operation.ensure_wanted):
            part = Pass(batch=drawn.batch, units=drawn.units)
            part_digest, engine_request = await self.executors.io(_prepare, run, part)
            result = await self._pass(run, operation, engine_request)
            assert result.contribution is not None
            gradients.update(await self.executors.io(result.contribution.digest))
            await self.accumulate(run, operation, result)
            run.pending = Pass
            results.append(replace(result, contribution=None))
            digest.update(part_digest)
        output = self._output_of_pass(run, digest.digest(), _together(results), gradients.digest(), operation)
        if private.config.diagnostics == "off":
            # Even a keyed hash shows which draws are equal: on a dataset of one unit, when that unit came.
            output = replace(output, batch_hash="", gradient_hash="")
        return output

    def poison(self, run: Run, error: Exception) -> None:
        """A training pass failed, however: the logical batch is incomplete, so the next step is refused once."""
        if run.status == ACTIVE and not isinstance(error, DPBudgetExceededError):
            run.poison = run.poison or (error.message if isinstance(error, TGTinkerError) else "it crashed")

    async def accumulate(self, run: Run, operation: Operation, result: PassResult) -> None:
        """Add what a pass computed to the logical batch."""
        assert result.contribution is not None
        operation.commit()
        await self.executors.compute(run.session.accumulate, result.contribution)
        run.passes += 1

    async def refuse_if_unaffordable(self, run: Run, private: PrivateRun) -> None:
        """Refuse a pass whose step could not be paid for.

        Raises:
            DPBudgetExceededError: it could not.
        """
        if private.config.sampling == "max_participation":
            return  # what the step costs depends on its units; the charge decides
        refusal = await self.executors.io(
            self.ledger.refusal,
            private.scope,
            run_id=run.run_id,
            event=private.event,
            accountant=private.accountant,
        )
        if refusal is not None:
            raise refusal

    async def describe(
        self, run: Run, digest: bytes, result: PassResult, operation: Operation
    ) -> ForwardBackwardOutput:
        """What a caller may see of a pass over the batch of this digest."""
        gradient = None
        if result.contribution is not None:
            gradient = await self.executors.io(result.contribution.digest)
        return self._output_of_pass(run, digest, result, gradient, operation)

    def _output_of_pass(
        self, run: Run, digest: bytes, result: PassResult, gradient: bytes | None, operation: Operation
    ) -> ForwardBackwardOutput:
        private = run.private
        gradient_hash = ""
        if gradient is not None:
            gradient_hash = run.mac_text("gradient", gradient) if private else "sha256:" + gradient.hex()
        shown = private is None or private.config.diagnostics == "owner"
        metrics = {
            "loss:sum": result.loss_sum,
            "loss:mean": result.loss_sum / max(1, result.num_targets),
            "tokens:sum": float(result.num_targets),
            "records:sum": float(result.num_records),
        }
        return ForwardBackwardOutput(
            loss=result.loss if shown else math.nan,
            batch_hash=run.mac_text("batch", digest) if private else "sha256:" + digest.hex(),
            gradient_hash=gradient_hash,
            num_tokens=result.num_tokens if shown else 0,
            latency_ms=operation.elapsed_ms(),
            metrics=metrics if shown else {},
        )


def _spent_so_far(spent: Spent) -> dict[str, float]:
    """What the dataset had spent before the step that a pass belongs to; the largest of several parts. Public."""
    metrics = {"privacy/epsilon:max": spent.epsilon, "privacy/delta:max": spent.delta}
    if spent.target_epsilon is not None and math.isfinite(spent.target_epsilon):
        metrics["privacy/target_epsilon:max"] = spent.target_epsilon
    return metrics


def _together(results: Sequence[PassResult]) -> PassResult:
    """The figures of one draw that took several passes."""
    records = sum(r.num_records for r in results)
    return PassResult(
        loss=sum(r.loss * r.num_records for r in results) / max(1, records),
        loss_sum=sum(r.loss_sum for r in results),
        num_targets=sum(r.num_targets for r in results),
        num_tokens=sum(r.num_tokens for r in results),
        num_records=records,
        contribution=None,
    )


def _prepare(run: Run, request: Pass) -> tuple[bytes, PassRequest]:
    """What takes time in proportion to the batch: its digest, and the request for the engine."""
    engine_request = PassRequest.of_batch(
        request.batch, units=request.units, train=request.train, seed=run.dropout_seed()
    )
    return batch_digest(request.batch), engine_request

"""forward_backward and optim_step: the logical batch, the charge, the release."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tg_tinker.errors import (
    DPBudgetExceededError,
    DPUnsupportedError,
    FutureCancelledError,
    InvalidRequestError,
    ServerError,
    TGTinkerError,
)
from tg_tinker.types import (
    DPMetrics,
    ForwardBackwardOutput,
    OptimStepOutput,
    batch_digest,
)
from tg_tinker.wire.calls import LossPass, Pass, Step
from tg_tinker_server.config import SharePasses
from tg_tinker_server.dp.events import Unnoised
from tg_tinker_server.dp.mechanism import GaussianMechanism
from tg_tinker_server.engine.backend import (
    EngineState,
    LossRequest,
    PassRequest,
    PassResult,
    Session,
    StepRequest,
    StepResult,
)
from tg_tinker_server.engine.requests import naming_of
from tg_tinker_server.engine.schedules import learning_rate_at
from tg_tinker_server.ledger.participation import BY_ID
from tg_tinker_server.ledger.privacy_ledger import PrivacyLedger
from tg_tinker_server.ledger.reservation import Reservation, Spent
from tg_tinker_server.service.crashes import log_crash
from tg_tinker_server.service.custom_losses import CustomLosses
from tg_tinker_server.service.datums import check_datums, outputs_of, prepare_datums, tokens_of
from tg_tinker_server.service.draws import DrawService, require_drawable
from tg_tinker_server.service.durability import Durability
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.service.lanes import Operation
from tg_tinker_server.service.log import LogService
from tg_tinker_server.service.passes import PassQueue, sharing_group
from tg_tinker_server.service.run import ACTIVE, DONE, PrivateRun, Run
from tg_tinker_server.store.database import Transaction

NAN = float("nan")
LARGE_BATCH = 1 << 12  # tokens with padding from which preparing a batch leaves the event loop


@dataclass(frozen=True, slots=True)
class TrainingService:
    """The two operations that training is made of. Each runs inside the run's lane."""

    ledger: PrivacyLedger
    log: LogService
    durability: Durability
    executors: Executors
    passes: PassQueue
    draws: DrawService
    losses: CustomLosses
    share_passes: SharePasses
    max_batch_records: int
    max_batch_tokens: int

    async def forward_backward(
        self, run: Run, operation: Operation, request: Pass | LossPass
    ) -> ForwardBackwardOutput:
        """Add one batch to the logical batch, or only evaluate it; or draw the logical batch from a dataset.

        A logical batch is made of batches or of datums: a mean over records and a sum over datums cannot be added.
        """
        run.require_intact()
        if request.train:
            run.require_active()
            _refuse_mixture(run, request)
        if isinstance(request, LossPass):
            return await self._forward_backward_datums(run, operation, request)
        if request.dataset_id:
            return await self._draw(run, operation, request)
        self._check(run, request)
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
        self.refuse_too_many(len(request.data), "forward_backward", field="data")
        check_datums(run, request, max_tokens=self.max_batch_tokens)
        self._check_units(run, request, len(request.data))
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
        figures = {"loss:sum": result.loss_sum, **result.metrics} if shown else {"loss:sum": NAN}
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

    def _check(self, run: Run, request: Pass) -> None:
        records, tokens = request.batch.input_ids.shape
        private = run.private
        if request.train:
            refuse_if_drawn_here(run, field="batch")
        empty_draw = request.train and private is not None and private.config.sampling == "poisson"
        if (records == 0 or tokens == 0) and not empty_draw:
            raise InvalidRequestError(
                "the batch is empty; only a Poisson draw (DPConfig.sampling='poisson') may be",
                field="batch.input_ids",
                constraint="at least one record of one token",
            )
        self.refuse_too_many(records, "forward_backward", field="batch.input_ids")
        if records * tokens > self.max_batch_tokens:
            raise InvalidRequestError(
                f"the batch has {records * tokens} tokens with padding, over the {self.max_batch_tokens} of one "
                "call; split it into several forward_backward calls, they add up",
                field="batch.input_ids",
                constraint=f"at most {self.max_batch_tokens} tokens with padding",
            )
        if tokens > run.config.max_sequence_length:
            raise InvalidRequestError(
                f"records of {tokens} tokens are longer than max_sequence_length={run.config.max_sequence_length}; "
                "cut them yourself, nothing is cut silently",
                field="batch.input_ids",
                constraint=f"at most {run.config.max_sequence_length} tokens",
            )
        self._check_units(run, request, records)

    @staticmethod
    def _check_units(run: Run, request: Pass | LossPass, records: int) -> None:
        units, private = request.units, run.private
        if units is not None and len(units) != records:
            raise InvalidRequestError(
                f"{len(units)} privacy_unit_ids for {records} records",
                field="privacy_unit_ids",
                constraint="one per record",
            )
        needs_units = private is not None and request.train and private.config.privacy_unit != "datum"
        if needs_units and units is None and records:
            assert private is not None
            raise InvalidRequestError(
                f"privacy_unit={private.config.privacy_unit!r} needs privacy_unit_ids: say whose each record is",
                field="privacy_unit_ids",
                constraint="one per record",
            )

    def refuse_too_many(self, records: int, operation: str, *, field: str) -> None:
        """Refuse more records than one call may have."""
        if records > self.max_batch_records:
            raise InvalidRequestError(
                f"the batch has {records} records, over the {self.max_batch_records} of one call; split it into "
                f"several {operation} calls, they add up",
                field=field,
                constraint=f"at most {self.max_batch_records} records",
            )

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
            loss=result.loss if shown else NAN,
            batch_hash=run.mac_text("batch", digest) if private else "sha256:" + digest.hex(),
            gradient_hash=gradient_hash,
            num_tokens=result.num_tokens if shown else 0,
            latency_ms=operation.elapsed_ms(),
            metrics=metrics if shown else {},
        )

    async def optim_step(self, run: Run, operation: Operation, request: Step) -> OptimStepOutput:
        """Charge, release, settle (docs/privacy.md). Refused steps change nothing and cost nothing.

        A refusal is as final as a result: it is kept, so that a restart does not turn it into a step.
        """
        try:
            return await self._optim_step(run, operation, request)
        except FutureCancelledError:
            raise  # left no effect
        except TGTinkerError as e:
            if run.session.pending_calls == 0:
                await self.durability.advance(
                    run,
                    operation,
                    None,
                    state_id=run.state_id,
                    step=run.step,
                    status=DONE if run.status == DONE else ACTIVE,
                    error=e,
                )
            else:
                await self.durability.keep_result(run, operation, None, error=e)
            raise

    async def _optim_step(self, run: Run, operation: Operation, request: Step) -> OptimStepOutput:
        run.require_active()
        why = run.poison or request.incomplete
        if why:
            run.drop_pending()
            raise InvalidRequestError(
                f"a forward_backward or add_updates since the last step failed ({why}), so its batch is incomplete "
                "and was dropped; send the batch again",
                field="optim_step",
                constraint="every forward_backward of the step succeeded",
            )
        if run.session.pending_calls == 0:
            raise InvalidRequestError(
                "nothing was accumulated since the last step; call forward_backward (in train mode) or add_updates "
                "first",
                field="optim_step",
                constraint="at least one forward_backward or add_updates",
            )
        if request.adam is not None and run.config.optimizer.name not in ("adam", "adamw"):
            raise InvalidRequestError(
                f"adam_params are for adam and adamw; this run has {run.config.optimizer.name}. Leave them out, or "
                "create the run with OptimizerConfig(name='adamw')",
                field="adam_params",
                constraint="an Adam optimizer",
            )
        operation.commit()
        rate = learning_rate_at(run.config.optimizer, step=run.step, max_steps=run.config.max_steps)
        if request.adam is not None:
            rate = request.adam.learning_rate
        paid = None
        if run.private is not None:
            self._refuse_unlikely_draw(run, run.private)
            paid = await self._charge(run, run.private, operation, request.apply_dp_noise)
        async with run.weights:
            return await self._release(run, operation, request, rate, paid)

    async def _charge(self, run: Run, private: PrivateRun, operation: Operation, apply_dp_noise: bool) -> Reservation:
        config = private.config
        if not apply_dp_noise and not config.allow_unnoised_steps:
            raise DPUnsupportedError(
                "apply_dp_noise=False would release the private gradient as it is (epsilon infinite)",
                feature="apply_dp_noise",
                reason="an un-noised release has no finite epsilon",
                alternative="leave apply_dp_noise=True, or create the run with "
                "DPConfig(target_epsilon=None, allow_unnoised_steps=True)",
            )
        counted = config.sampling == "max_participation"
        units = await self.executors.io(_unit_macs, run, run.session.pending_units) if counted else ()
        return await self.executors.io(
            self.ledger.reserve,
            private.scope,
            run_id=run.run_id,
            seq=operation.seq,
            event=private.event if apply_dp_noise else Unnoised(),
            accountant=private.accountant,
            unit_macs=units,
            unit_naming=_naming(run),
            max_participation=config.max_participation if counted else None,
        )

    async def _release(
        self, run: Run, operation: Operation, step: Step, rate: float, paid: Reservation | None
    ) -> OptimStepOutput:
        private = run.private
        proving = None if paid is None else asyncio.ensure_future(self.log.receipt(paid, step.known_log_size))
        mechanism = None
        if paid is not None and private is not None and not isinstance(paid.event, Unnoised):
            # The scale comes from what the ledger recorded, never from the configuration.
            mechanism = GaussianMechanism(paid.event.noise_multiplier, private.config.max_grad_norm, private.noise)
        clip = run.config.optimizer.max_grad_norm if step.adam is None else step.adam.grad_clip_norm or None
        request = StepRequest(learning_rate=rate, mechanism=mechanism, global_clip=clip, adam=step.adam)
        try:
            done, engine = await self.executors.compute(_step, run.session, request)
            output = self._output(run, done, rate, paid, operation)
            output.receipt = await proving if proving is not None else None
            state_id = await self.durability.write_state(run, engine, step=run.step + 1)
            await self.durability.advance(
                run,
                operation,
                output,
                state_id=state_id,
                step=run.step + 1,
                status=DONE if run.config.max_steps == run.step + 1 else ACTIVE,
                settle=self._settlement(paid, "released", self._update_hash(run, paid, done)) if paid else None,
            )
        except Exception as e:
            await self._undo(run, operation, paid, e)
            raise
        finally:
            if proving is not None:
                proving.cancel()
        run.drop_pending()
        return output

    def _refuse_unlikely_draw(self, run: Run, private: PrivateRun) -> None:
        """What a Poisson draw at the declared rate practically never is, was not one."""
        if private.config.sampling != "poisson" or private.drawn_here:
            return
        drawn, expected = len(run.session.pending_units), run.config.expected_batch_size
        size = private.config.dataset_size or 0
        # Bernstein: a sum of independent draws exceeds this with probability below 1e-14.
        if drawn > min(size, expected + 8.0 * math.sqrt(expected) + 32.0):
            run.drop_pending()
            raise InvalidRequestError(
                f"the logical batch holds {drawn} units, but Poisson sampling at the declared rate draws {expected} "
                f"of {size} on average; the batch was dropped. Draw with PoissonSampler.from_config(config), one "
                "draw per optim_step, or use sampling='none'",
                field="batch",
                constraint="one Poisson draw per step",
            )

    def _update_hash(self, run: Run, paid: Reservation, done: StepResult) -> str:
        """Public for a noised update; keyed for an exact one, which could be confirmed by guessing."""
        if isinstance(paid.event, Unnoised):
            return run.mac_text("update", done.update_hash.encode())
        return done.update_hash

    def _settlement(
        self, paid: Reservation, outcome: Literal["released", "failed"], update_hash: str
    ) -> Callable[[Transaction], None]:
        def settle(tx: Transaction) -> None:
            self.ledger.settle(tx, paid, outcome=outcome, update_hash=update_hash)

        return settle

    async def _undo(self, run: Run, operation: Operation, paid: Reservation | None, cause: Exception) -> None:
        """Nothing was released: go back to the last durable weights. What was paid stays paid."""
        ours = not isinstance(cause, TGTinkerError)
        # An error for people is told to its caller; what lies behind a ServerError, a disk or a key, only to the log.
        reference = log_crash(operation, cause.__cause__ or cause) if ours or isinstance(cause, ServerError) else ""
        run.drop_pending()
        await self.durability.rewind(run)
        if paid is not None:
            await self.executors.io(self.durability.db.write, self._settlement(paid, "failed", ""))
        if ours:
            raise ServerError(
                f"the step failed inside the server (reference {reference}); weights are as before"
                + (", the charge stays" if paid else "")
                + "; send the batch again",
                details={"reference": reference},
            ) from cause

    def _output(
        self, run: Run, done: StepResult, rate: float, paid: Reservation | None, operation: Operation
    ) -> OptimStepOutput:
        metrics = {"unclipped_grad_norm": done.grad_norm}
        dp = None
        if paid is not None and run.private is not None:
            shown = run.private.config.diagnostics == "owner"
            noised = not isinstance(paid.event, Unnoised)
            before, after = paid.epsilon_before, paid.epsilon_after
            dp = DPMetrics(
                noise_applied=noised,
                epsilon_spent=after if math.isinf(after) else after - before,
                total_epsilon=after,
                delta=paid.delta,
                grad_norm_before_clip=done.norm_before_clip if shown else NAN,
                grad_norm_after_clip=done.norm_after_clip if shown else NAN,
                num_clipped=done.num_clipped if shown else -1,
            )
            metrics.update(_privacy_metrics(run.private, paid, dp))
            if shown:
                metrics["nonfinite_units"] = float(done.nonfinite_units)
        return OptimStepOutput(
            grad_norm=done.grad_norm,
            learning_rate=rate,
            step=run.step + 1,
            dp_metrics=dp,
            latency_ms=operation.elapsed_ms(),
            metrics=metrics,
        )


def _refuse_mixture(run: Run, request: Pass | LossPass) -> None:
    if run.pending is not None and run.pending is not type(request):
        raise InvalidRequestError(
            "a logical batch is made of batches or of datums, not of both: the loss of a batch is a mean over "
            "records, that of datums a sum. Call optim_step between them",
            field="data",
            constraint="one form per optim_step",
        )


def _privacy_metrics(private: PrivateRun, paid: Reservation, dp: DPMetrics) -> dict[str, float]:
    """What a step cost, by names that land in a user's own metrics file. All of it is public."""
    noise = 0.0 if isinstance(paid.event, Unnoised) else paid.event.noise_multiplier
    metrics = {
        "privacy/epsilon": dp.total_epsilon,
        "privacy/epsilon_spent": dp.epsilon_spent,
        "privacy/delta": dp.delta,
        "privacy/noise_multiplier": noise,
    }
    if private.config.target_epsilon is not None and private.config.finite_target:
        metrics["privacy/target_epsilon"] = private.config.target_epsilon
    return metrics


def _spent_so_far(spent: Spent) -> dict[str, float]:
    """What the dataset had spent before the step that a pass belongs to; the largest of several parts. Public."""
    metrics = {"privacy/epsilon:max": spent.epsilon, "privacy/delta:max": spent.delta}
    if spent.target_epsilon is not None and math.isfinite(spent.target_epsilon):
        metrics["privacy/target_epsilon:max"] = spent.target_epsilon
    return metrics


def refuse_if_drawn_here(run: Run, *, field: str) -> None:
    """Refuse what callers send where the server draws.

    Raises:
        InvalidRequestError: it does.
    """
    if run.private is not None and run.private.drawn_here:
        raise InvalidRequestError(
            f"the server draws the batches of this run from dataset {run.private.scope.dataset_id}; call "
            "forward_backward(dataset=...). To choose batches yourself, create the run with "
            "DPConfig(sampling='none'), which claims no amplification",
            field=field,
            constraint="drawn by the server",
        )


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


def _unit_macs(run: Run, units: tuple[str, ...]) -> tuple[bytes, ...]:
    return tuple(run.mac("unit", u.encode()) for u in units)


def _naming(run: Run) -> str:
    """How the units of the logical batch got their names."""
    units = run.session.pending_units
    match naming_of(units[0]) if units else "id":
        case "id":
            return BY_ID
        case "prompt":
            return "their prompts"
        case "content":  # which tokens are hashed differs: a datum lacks the last one, which is a target only
            return "the content of datums" if run.pending is LossPass else "the content of batches"


def _step(session: Session, request: StepRequest) -> tuple[StepResult, EngineState]:
    """A step and the state after it, in one visit to the compute thread."""
    return session.step(request), session.export_state(optimizer=True)


def _prepare(run: Run, request: Pass) -> tuple[bytes, PassRequest]:
    """What takes time in proportion to the batch: its digest, and the request for the engine."""
    engine_request = PassRequest.of_batch(
        request.batch, units=request.units, train=request.train, seed=run.dropout_seed()
    )
    return batch_digest(request.batch), engine_request

"""optim_step: charge, release, settle."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tg_tinker.errors import (
    DPUnsupportedError,
    FutureCancelledError,
    InvalidRequestError,
    ServerError,
    TGTinkerError,
)
from tg_tinker.types import DPMetrics, OptimStepOutput
from tg_tinker.wire.calls import LossPass, Step
from tg_tinker_server.dp.events import Unnoised
from tg_tinker_server.dp.mechanism import GaussianMechanism
from tg_tinker_server.engine.backend import EngineState, Session, StepRequest, StepResult
from tg_tinker_server.engine.requests import naming_of
from tg_tinker_server.engine.schedules import learning_rate_at
from tg_tinker_server.ledger.participation import BY_ID
from tg_tinker_server.ledger.privacy_ledger import PrivacyLedger
from tg_tinker_server.ledger.reservation import Reservation
from tg_tinker_server.service.crashes import log_crash
from tg_tinker_server.service.durability import Durability
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.service.lanes import Operation
from tg_tinker_server.service.log import LogService
from tg_tinker_server.service.run import ACTIVE, DONE, PrivateRun, Run
from tg_tinker_server.store.database import Transaction


@dataclass(frozen=True, slots=True)
class StepService:
    """Turns a run's logical batch into new weights, inside the run's lane."""

    ledger: PrivacyLedger
    log: LogService
    durability: Durability
    executors: Executors

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
                grad_norm_before_clip=done.norm_before_clip if shown else math.nan,
                grad_norm_after_clip=done.norm_after_clip if shown else math.nan,
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

"""What a configuration releases each step, what it costs, and what may still be spent."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from tg_tinker.errors import InvalidRequestError, ResourceNotFoundError
from tg_tinker.ledger import LedgerEntry
from tg_tinker.ledger.audits import MAX_BYTES, summary_of
from tg_tinker.types import TrainingConfig
from tg_tinker.wire.json_text import json_from_text
from tg_tinker_server.dp.calibration import Forecast, noise_multiplier_for
from tg_tinker_server.dp.events import Event, Gaussian, ParticipationGaussian, SampledGaussian
from tg_tinker_server.ledger.privacy_ledger import PrivacyLedger
from tg_tinker_server.ledger.report import ReportWriter
from tg_tinker_server.ledger.reservation import DatasetScope, Spent
from tg_tinker_server.service.caller import Caller
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.service.run import PrivateRun, Run
from tg_tinker_server.store import run_rows

MAX_FORECAST_STEPS = 10_000_000
_LINE = 100  # bytes of an answer beside an entry's body: its hash, and what frames both


def resolve_noise_multiplier(config: TrainingConfig) -> float:
    """The noise multiplier, solved for when the configuration says "auto".

    "auto" spends ``target_epsilon`` over ``max_steps`` on a dataset nobody has spent from; where something was
    spent before, the gate stops earlier.
    """
    dp = config.dp_config
    assert dp is not None
    if dp.noise_multiplier != "auto":
        return float(dp.noise_multiplier)
    assert dp.target_epsilon is not None
    assert config.max_steps is not None
    steps = config.max_steps
    if dp.sampling == "max_participation" and dp.max_participation is not None:
        steps = min(steps, dp.max_participation)
    return noise_multiplier_for(
        target_epsilon=dp.target_epsilon,
        target_delta=dp.target_delta,
        sample_rate=config.sample_rate,
        steps=steps,
    )


def release_event(config: TrainingConfig, noise_multiplier: float) -> Event:
    """What one step of this configuration releases. Amplification only where somebody vouches for the draw."""
    dp = config.dp_config
    assert dp is not None
    if dp.sampling == "poisson":
        return SampledGaussian(noise_multiplier=noise_multiplier, sample_rate=config.sample_rate, vouched_by="client")
    if dp.sampling == "max_participation":
        return ParticipationGaussian(noise_multiplier=noise_multiplier, releases=1)
    return Gaussian(noise_multiplier=noise_multiplier)


@dataclass(frozen=True, slots=True)
class PrivacyService:
    """Questions about budgets."""

    ledger: PrivacyLedger
    reports: ReportWriter
    executors: Executors

    async def spent(self, run: Run) -> Spent | None:
        """What the run's dataset has spent; ``None`` without differential privacy."""
        return None if run.private is None else await self.spent_in(run.private.scope)

    async def spent_in(self, scope: DatasetScope) -> Spent:
        """What a dataset has spent."""
        return await self.executors.io(self.ledger.spent, scope)

    async def forecast(self, run: Run, steps: int) -> Forecast:
        """Epsilon now and after ``steps`` more steps of this run, and how many the budget allows."""
        if run.private is None:
            raise InvalidRequestError(
                "this training client has no differential privacy; give it a DPConfig",
                field="dp_config",
                constraint="enabled",
            )
        if not 0 <= steps <= MAX_FORECAST_STEPS:
            raise InvalidRequestError(
                f"steps must be 0 to {MAX_FORECAST_STEPS}",
                field="steps",
                constraint=f"0 to {MAX_FORECAST_STEPS}",
            )
        return await self.executors.accounting(
            self.ledger.forecast,
            run.private.scope,
            run_id=run.run_id,
            event=run.private.event,
            steps=steps,
            accountant=run.private.accountant,
            releases_left=await self._releases_left(run.private, run.run_id),
        )

    async def _releases_left(self, private: PrivateRun, run_id: str) -> int | None:
        limit = private.config.max_participation
        if private.config.sampling != "max_participation" or limit is None:
            return None
        return limit - await self.executors.io(self.ledger.participation, private.scope, run_id)

    async def entries(self, caller: Caller, dataset_id: str) -> tuple[list[LedgerEntry], Spent]:
        """The whole ledger of a dataset that the caller may see.

        Raises:
            ResourceNotFoundError: there is no such dataset.
            InvalidRequestError: it is larger than one answer.
        """
        _require_visible(caller, dataset_id)
        scope = DatasetScope(tenant=caller.tenant, dataset_id=dataset_id)
        count, size = await self.executors.io(self.ledger.weight, scope)
        size += _LINE * count
        if size > self.reports.most_bytes:
            raise InvalidRequestError(
                f"the ledger of {dataset_id} has {count:,} entries, {size / 2**20:.3g} MiB, over the "
                f"{self.reports.most_bytes / 2**20:.3g} MiB of one answer; read the log in pages of 1,000 instead "
                "(GetLogEntries), of which it is a part",
                field="dataset_id",
                constraint=f"a ledger of at most {self.reports.most_bytes} bytes",
            )
        entries = await self.executors.io(self.ledger.entries, scope)
        if not entries:
            raise _no_dataset(dataset_id)
        return entries, await self.executors.io(self.ledger.spent, scope)

    async def attach_audit(self, caller: Caller, dataset_id: str, result_json: str) -> None:
        """Note an empirical audit in the dataset's ledger.

        Raises:
            InvalidRequestError: it is not the result of one.
        """
        if len(result_json) > MAX_BYTES:
            raise InvalidRequestError("the result is over 1 MiB", field="result", constraint="at most 1 MiB of JSON")
        summary = summary_of(json_from_text(result_json, field="result"))
        _require_visible(caller, dataset_id)
        scope = DatasetScope(tenant=caller.tenant, dataset_id=dataset_id)
        await self.executors.io(partial(self.ledger.note_audit, scope, result=summary, actor=caller.key_id))

    async def report_for(self, caller: Caller, dataset_or_run: str) -> bytes:
        """The signed report on a dataset that the caller may see, or on the dataset of a run.

        Raises:
            ResourceNotFoundError: there is none for this caller.
            InvalidRequestError: the run has no differential privacy.
        """
        if caller.policy is not None:
            try:
                scope = await self.executors.io(self._scope_of, caller.tenant, dataset_or_run)
            except InvalidRequestError:  # a run without privacy is missing for this key, as every other foreign one
                scope = None
            if scope is None or scope.dataset_id != caller.policy.dataset_id:
                raise _no_dataset(dataset_or_run)
        return await self.report(caller.tenant, dataset_or_run)

    async def report(self, tenant: str, dataset_or_run: str) -> bytes:
        """The signed report on a tenant's dataset, or on the dataset of a run. It leaves an entry of its own.

        Raises:
            ResourceNotFoundError: neither a dataset nor a run of the tenant has that id.
            InvalidRequestError: the run has no differential privacy.
        """
        scope = await self.executors.io(self._scope_of, tenant, dataset_or_run)
        return await self.executors.accounting(self.reports.signed, scope)

    def _scope_of(self, tenant: str, dataset_or_run: str) -> DatasetScope:
        scope = DatasetScope(tenant=tenant, dataset_id=dataset_or_run)
        try:
            self.ledger.spent(scope)
        except ResourceNotFoundError:
            run = self.reports.log.db.read(lambda tx: run_rows.get_run(tx, tenant, dataset_or_run))
            if run is None:
                raise
            if run.dataset_id is None:
                raise InvalidRequestError(
                    "this run has no differential privacy, so there is nothing to report",
                    field="dataset_id",
                    constraint="a dataset, or a run with a DPConfig",
                ) from None
            return DatasetScope(tenant=tenant, dataset_id=run.dataset_id)
        return scope


def _require_visible(caller: Caller, dataset_id: str) -> None:
    if caller.policy is not None and caller.policy.dataset_id != dataset_id:
        raise _no_dataset(dataset_id)


def _no_dataset(asked: str) -> ResourceNotFoundError:
    """The same for what is missing and for what is another's; it names nothing but what was asked."""
    return ResourceNotFoundError("no such dataset for this tenant", resource_type="dataset", resource_id=asked)

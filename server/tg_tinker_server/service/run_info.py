"""Runs as their owners see them, whichever door they come through."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tg_tinker.types import TrainingConfig
from tg_tinker.types.run import PrivacyState, RunInfo
from tg_tinker_server.ledger.reservation import DatasetScope
from tg_tinker_server.service.caller import Caller
from tg_tinker_server.service.privacy import PrivacyService
from tg_tinker_server.service.run import ACTIVE, Run
from tg_tinker_server.service.runs import RunRegistry
from tg_tinker_server.service.tokenizers import Tokenizers
from tg_tinker_server.store.run_rows import RunRow


@dataclass(frozen=True, slots=True)
class RunInfos:
    """Describes runs.

    Attributes:
        epoch: of this server process.
    """

    registry: RunRegistry
    privacy: PrivacyService
    tokenizers: Tokenizers
    epoch: str

    async def get(self, caller: Caller, run_id: str) -> RunInfo:
        """A run with all that a handle on it needs. What has ended takes no memory to look at.

        Raises:
            ResourceNotFoundError: there is none for this caller.
        """
        row = await self.registry.row(caller, run_id)
        if row.status != ACTIVE and not self.registry.in_memory(caller.tenant, run_id):
            return await self._ended(row)
        info = await self.of_run(await self.registry.get(caller, run_id))
        if "TRAIN" not in caller.scopes:
            info = replace(info, unit_key=b"")  # who can key unit ids can recognise people
        return info

    async def of_run(self, run: Run) -> RunInfo:
        """A run in memory."""
        private = run.private
        privacy = None
        if private is not None:
            privacy = await self._privacy_state(private.scope, private.noise_multiplier, run.config)
        return replace(
            await self.of_row(await self._row(run)),
            config=run.config,
            status=run.status,
            step=run.step,
            next_seq=run.lane.highest + 1,
            privacy=privacy,
            trainable_parameters=run.session.trainable_parameters,
            base_dtype=run.session.base_dtype,
            unit_key=run.mac("unit-ids", b""),
        )

    async def _row(self, run: Run) -> RunRow:
        return await self.registry.row(Caller(tenant=run.tenant, key_id="", scopes=frozenset()), run.run_id)

    async def of_row(self, row: RunRow) -> RunInfo:
        """A run as a list shows it; it is not brought back into memory for that."""
        families = {model.name: model.family for model in await self.registry.models()}
        config = await self.registry.executors.io(self.registry.config_of, row)
        return RunInfo(
            run_id=row.run_id,
            config=config,
            status=row.status,
            step=row.step,
            created=row.created,
            next_seq=0,
            server_epoch=self.epoch,
            family=families.get(config.model_ref, ""),
            tokenizer_id=self.tokenizers.id_of(config.model_ref),
            request_id=row.request_id,
            updated=row.updated,
        )

    async def _ended(self, row: RunRow) -> RunInfo:
        info = await self.of_row(row)
        highest = await self.registry.highest_seq(row)
        privacy = None
        if row.dataset_id is not None and row.noise_multiplier is not None:
            scope = DatasetScope(tenant=row.tenant, dataset_id=row.dataset_id)
            privacy = await self._privacy_state(scope, row.noise_multiplier, info.config)
        return replace(info, next_seq=highest + 1, privacy=privacy)

    async def _privacy_state(
        self, scope: DatasetScope, noise_multiplier: float, config: TrainingConfig
    ) -> PrivacyState:
        spent = await self.privacy.spent_in(scope)
        return PrivacyState(
            dataset_id=scope.dataset_id,
            epsilon_spent=spent.epsilon,
            target_epsilon=float("inf") if spent.target_epsilon is None else spent.target_epsilon,
            delta=spent.delta,
            noise_multiplier=noise_multiplier,
            sample_rate=config.sample_rate,
            expected_batch_size=config.expected_batch_size,
            ledger_head=spent.head,
        )

"""How a run comes into being: made from a configuration or a checkpoint, or brought back from its state on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tg_tinker.errors import InvalidRequestError, ServerError
from tg_tinker.types import TrainingConfig
from tg_tinker.wire.runs import config_from_json, config_to_json
from tg_tinker_server.crypto.envelope import TenantKeyring
from tg_tinker_server.dp.events import SampledGaussian
from tg_tinker_server.dp.rng import SecureNormal
from tg_tinker_server.engine.backend import Backend, Session
from tg_tinker_server.ledger.privacy_ledger import PrivacyLedger
from tg_tinker_server.ledger.reservation import DatasetScope
from tg_tinker_server.service.caller import Caller
from tg_tinker_server.service.checkpoint_fit import check_fits, lineage_with, takes_optimizer
from tg_tinker_server.service.checkpoints import CheckpointService
from tg_tinker_server.service.crashes import crash_to_error
from tg_tinker_server.service.datasets import with_dataset
from tg_tinker_server.service.durability import Durability, new_id, now
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.service.lanes import Lane
from tg_tinker_server.service.lineage import IMPORTED
from tg_tinker_server.service.paths import CONFIG
from tg_tinker_server.service.privacy import release_event, resolve_noise_multiplier
from tg_tinker_server.service.run import ACTIVE, PrivateRun, Run
from tg_tinker_server.service.sealed_text import SealedText
from tg_tinker_server.store import dataset_rows, run_rows
from tg_tinker_server.store.database import Database


@dataclass(frozen=True, slots=True)
class RunFactory:
    """Puts together a run: its session in the engine, its privacy, its lane. It holds none."""

    db: Database
    backend: Backend
    ledger: PrivacyLedger
    keyring: TenantKeyring
    texts: SealedText
    durability: Durability
    checkpoints: CheckpointService
    executors: Executors
    max_queue: int

    async def create(
        self, caller: Caller, request_id: str, config: TrainingConfig, checkpoint_id: str, optimizer: bool | None
    ) -> Run:
        """Make a run, starting from a checkpoint if one is named, and write its row. If that fails nothing is left.

        Raises:
            InvalidRequestError: the configuration cannot be, or does not go with the dataset or the checkpoint.
            ResourceNotFoundError: no such checkpoint for this caller.
        """
        tenant = caller.tenant
        run_id = new_id("run")
        start = None
        if checkpoint_id:
            artifact_id = (await self.checkpoints.row(caller, checkpoint_id)).artifact_id
            start = await self.checkpoints.open(tenant, artifact_id)
        session = await self.executors.compute(self.backend.open, run_id=run_id, config=config)
        try:
            private = await self._open_budget(tenant, run_id, config)
            row = run_rows.RunRow(
                tenant=tenant,
                run_id=run_id,
                request_id=request_id,
                config_json=await self.executors.io(self.texts.seal, tenant, CONFIG, config_to_json(config), run_id),
                status=ACTIVE,
                step=0,
                durable_seq=0,
                state_artifact_id=None,
                created=now(),
                updated=now(),
                dataset_id=private.scope.dataset_id if private else None,
                noise_multiplier=private.noise_multiplier if private else None,
            )
            run = await self._assemble(row, config, session, private)
            if start is not None:
                engine, state = start
                check_fits(run, state)
                with_optimizer = takes_optimizer(checkpoint_id, optimizer, state)
                await self.executors.compute(session.import_state, engine, optimizer=with_optimizer)
                run.step = int(state["step"])
                run.lineage = lineage_with(run, artifact_id, state)
            engine = await self.executors.compute(session.export_state, optimizer=True)
            run.state_id = await self.durability.write_state(run, engine, step=run.step)
            values = {k: getattr(row, k) for k in row.__dataclass_fields__}
            values.update(step=run.step, state_artifact_id=run.state_id)
            await self.executors.io(self.db.write, lambda tx: run_rows.insert_run(tx, run_rows.RunRow(**values)))
        except BaseException:
            await self.executors.compute(session.close)
            raise
        return run

    async def restore(self, row: run_rows.RunRow, config: TrainingConfig) -> Run:
        """A run as its last settled state left it, with the results that are newer in its lane."""
        if row.state_artifact_id is None:
            raise ServerError(f"training client {row.run_id} has no saved state")
        engine, state = await self.durability.read_state(row.tenant, row.state_artifact_id)
        session = await self.executors.compute(self.backend.open, run_id=row.run_id, config=config)
        try:
            await self.executors.compute(session.import_state, engine, optimizer=True)
            private = None
            if row.dataset_id is not None and row.noise_multiplier is not None:
                scope = DatasetScope(tenant=row.tenant, dataset_id=row.dataset_id)
                private = await self.executors.io(self._private, config, scope, row.noise_multiplier)
            run = await self._assemble(row, config, session, private)
            run.restored = True
            run.lineage = tuple(state.get("provenance", []))
            kept = await self.executors.io(
                self.db.read,
                lambda tx: run_rows.results_after(tx, row.tenant, row.run_id, row.durable_seq),
            )
            for result in kept:
                run.lane.submit(await self.executors.io(self.durability.operation_from_row, result))
        except BaseException:
            await self.executors.compute(session.close)
            raise
        return run

    async def _open_budget(self, tenant: str, run_id: str, config: TrainingConfig) -> PrivateRun | None:
        dp = config.dp_config
        if dp is None or not dp.enabled:
            return None
        scope = DatasetScope(tenant=tenant, dataset_id=dp.dataset_id or run_id)
        sigma = await self.executors.accounting(resolve_noise_multiplier, config)
        private = await self.executors.io(self._private, config, scope, sigma)
        await self.executors.accounting(
            self.ledger.open_dataset,
            scope,
            run_id=run_id,
            target_epsilon=dp.target_epsilon if dp.finite_target else None,
            target_delta=dp.target_delta,
            unit=dp.privacy_unit,
            accountant=private.accountant,
            mechanism=private.event,
            planned_steps=config.max_steps,
            initial_weights=dp.initial_weights,
            custom_loss=dp.custom_loss,
        )
        return private

    def _private(self, config: TrainingConfig, scope: DatasetScope, sigma: float) -> PrivateRun:
        assert config.dp_config is not None
        event = release_event(config, sigma)
        # A name is registered before its first run or never, so a restored run gets the event it was made with.
        if isinstance(event, SampledGaussian) and self._registered(scope.tenant, scope.dataset_id) is not None:
            event = replace(event, vouched_by="server")
        return PrivateRun(
            config=config.dp_config,
            scope=scope,
            event=event,
            noise_multiplier=sigma,
            accountant="prv" if config.dp_config.accountant_type == "prv" and config.max_steps else "rdp",
            noise=SecureNormal(),
        )

    def _registered(self, tenant: str, dataset_id: str) -> dataset_rows.StoreRow | None:
        return self.db.read(lambda tx: dataset_rows.find_dataset(tx, tenant, dataset_id))

    def with_dataset(self, tenant: str, config: TrainingConfig) -> TrainingConfig:
        """The configuration with what the registration of its dataset says about the size.

        Call it off the event loop.
        """
        dp = config.dp_config
        if dp is None or not dp.enabled:
            return config
        row = self._registered(tenant, dp.dataset_id) if dp.dataset_id else None
        return with_dataset(config, dp, row)

    async def _assemble(
        self, row: run_rows.RunRow, config: TrainingConfig, session: Session, private: PrivateRun | None
    ) -> Run:
        secret = await self.executors.io(self.keyring.mac_key, row.tenant, "run/" + row.run_id)
        return Run(
            tenant=row.tenant,
            run_id=row.run_id,
            config=config,
            session=session,
            lane=Lane(
                row.run_id,
                expected=row.durable_seq + 1,
                max_queue=self.max_queue,
                kept=self.durability.kept_results,
                on_crash=crash_to_error,
            ),
            private=private,
            secret=secret,
            created=row.created,
            status=row.status,
            step=row.step,
            durable_seq=row.durable_seq,
            state_id=row.state_artifact_id or "",
        )


def configuration_from(
    state: Mapping[str, Any], base_model: str, metadata: Mapping[str, Any] | None
) -> TrainingConfig:
    """The configuration of the run that goes on from a checkpoint; what the old one spent, the new one shares.

    Raises:
        InvalidRequestError: another base model; or it came from elsewhere, without a configuration.
    """
    if state["run_id"] == IMPORTED:
        raise InvalidRequestError(
            "this checkpoint came from elsewhere, without the configuration of its run; create a run with a "
            "configuration, starting from it",
            field="path",
            constraint="a checkpoint of this server",
        )
    config = config_from_json(json.dumps(state["config"]))
    if base_model and base_model != config.model_ref:
        raise InvalidRequestError(
            f"the checkpoint was trained on {config.model_ref}, not on {base_model}",
            field="base_model",
            constraint=config.model_ref,
        )
    dp = config.dp_config
    if dp is not None and dp.enabled and state["ledger"] is not None:
        dp = dp.model_copy(update={"dataset_id": state["ledger"]["dataset_id"]})
    changes: dict[str, Any] = {"dp_config": dp}
    if metadata is not None:
        changes["metadata"] = dict(metadata)
    return config.model_copy(update=changes)

"""The life of training runs: create, find (also after a restart), list, unload, delete."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from tg_tinker.errors import InvalidRequestError, RateLimitedError, ResourceNotFoundError, ServerError
from tg_tinker.types import TrainingConfig
from tg_tinker.types.info import ModelInfo
from tg_tinker.wire.runs import config_from_json, config_to_json
from tg_tinker_server.crypto.envelope import TenantKeyring
from tg_tinker_server.dp.events import SampledGaussian
from tg_tinker_server.dp.rng import SecureNormal
from tg_tinker_server.engine.backend import Backend, Session
from tg_tinker_server.ledger.privacy_ledger import PrivacyLedger
from tg_tinker_server.ledger.reservation import DatasetScope
from tg_tinker_server.service.caller import Caller
from tg_tinker_server.service.checkpoint_fit import check_fits, lineage_with, takes_optimizer
from tg_tinker_server.service.checkpoints import CheckpointService, check_page
from tg_tinker_server.service.crashes import crash_to_error
from tg_tinker_server.service.datasets import with_dataset
from tg_tinker_server.service.durability import Durability, new_id, now
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.service.lanes import Lane
from tg_tinker_server.service.lineage import IMPORTED
from tg_tinker_server.service.paths import CONFIG
from tg_tinker_server.service.privacy import release_event, resolve_noise_multiplier
from tg_tinker_server.service.run import ACTIVE, DONE, PrivateRun, Run
from tg_tinker_server.service.sealed_text import SealedText
from tg_tinker_server.store import dataset_rows, run_rows
from tg_tinker_server.store.database import Database, Transaction

T = TypeVar("T")
Page = tuple[list[run_rows.RunRow], int]
MAX_REQUEST_ID = 128
MAX_OPERATION_S = 600.0


def run_not_found(run_id: str) -> ResourceNotFoundError:
    """The one answer for a missing run and for another tenant's."""
    return ResourceNotFoundError(
        "no such training client for this tenant", resource_type="training_client", resource_id=run_id
    )


@dataclass(frozen=True, slots=True)
class RunRegistry:
    """Every run this server has in memory, and how to bring one back from disk."""

    db: Database
    backend: Backend
    ledger: PrivacyLedger
    keyring: TenantKeyring
    texts: SealedText
    durability: Durability
    checkpoints: CheckpointService
    executors: Executors
    max_queue: int
    max_runs_per_tenant: int
    _runs: dict[tuple[str, str], Run] = field(default_factory=dict)
    _locks: dict[tuple[str, str], asyncio.Lock] = field(default_factory=dict)
    _models: list[ModelInfo] = field(default_factory=list)

    async def models(self) -> list[ModelInfo]:
        """What is offered. Asked once: later calls wait for nobody's training."""
        if not self._models:
            self._models[:] = await self.executors.compute(self.backend.models)
        return self._models

    async def create(
        self,
        caller: Caller,
        request_id: str,
        config: TrainingConfig,
        checkpoint_id: str = "",
        optimizer: bool | None = None,
    ) -> Run:
        """Make a run; a repeated request gets the run that the first one made.

        Args:
            caller: whose policy, if there is one, fills in the privacy of the run.
            checkpoint_id: id or path to start from; with an id goes all that was saved, with a path the weights.
            optimizer: says otherwise.

        Raises:
            InvalidRequestError: the configuration cannot be, or is looser than the policy; or the request made
                another run.
            ResourceNotFoundError: no such checkpoint for this caller.
        """
        _check_request_id(request_id)
        if caller.policy is not None:
            config = caller.policy.apply(config)
        return await _whole(self._create_once(caller, request_id, config, checkpoint_id, optimizer))

    async def create_from(
        self,
        caller: Caller,
        request_id: str,
        path: str,
        *,
        optimizer: bool | None = None,
        base_model: str = "",
        metadata: Mapping[str, Any] | None = None,
    ) -> Run:
        """Make a run that goes on where a checkpoint was saved: its configuration, its dataset, its step.

        A repeated request gets the run that the first one made, also where the checkpoint is gone meanwhile.

        Args:
            path: of the checkpoint, or its id.
            optimizer: whether its optimizer goes on as well; ``None`` as in `create`.
            base_model: refused if it is not the checkpoint's.
            metadata: of the new run; ``None``: as the old one's.

        Raises:
            ResourceNotFoundError: no such checkpoint for this caller.
            InvalidRequestError: another base model; or it came from elsewhere, without a configuration.
        """
        _check_request_id(request_id)
        made = await self.executors.io(
            self.db.read, lambda tx: run_rows.find_run_by_request(tx, caller.tenant, request_id)
        )
        if made is not None:
            return await self.get(caller, made.run_id)
        row = await self.checkpoints.row(caller, path)
        _, state = await self.checkpoints.open(caller.tenant, row.artifact_id)
        config = _configuration(state, base_model, metadata)
        return await self.create(caller, request_id, config, path, optimizer)

    async def _create_once(
        self, caller: Caller, request_id: str, config: TrainingConfig, checkpoint_id: str, optimizer: bool | None
    ) -> Run:
        # One create of a tenant at a time: neither a repeated request nor the limit of runs can be raced.
        tenant = caller.tenant
        async with self._locks.setdefault((tenant, ""), asyncio.Lock()):
            made = await self.executors.io(
                self.db.read, lambda tx: run_rows.find_run_by_request(tx, tenant, request_id)
            )
            config = await self.executors.io(self._with_dataset, tenant, config)
            if made is not None:
                run = await self.get(caller, made.run_id)
                if run.config.model_dump() != config.model_dump():
                    raise InvalidRequestError(
                        "this request_id made a training client with another configuration",
                        field="request_id",
                        constraint="one configuration per request_id",
                    )
                return run
            return await self._create(caller, request_id, config, checkpoint_id, optimizer)

    async def get(self, caller: Caller, run_id: str) -> Run:
        """A run that the caller may see, restored from its last settled state if this process does not hold it yet.

        Raises:
            ResourceNotFoundError: there is none for this caller.
        """
        run = self._runs.get((caller.tenant, run_id))
        if run is None:
            await self.row(caller, run_id)
            return await _whole(self._get_once(caller, run_id))
        if not caller.sees(run.config):
            raise run_not_found(run_id)
        return run

    async def find(self, caller: Caller, request_id: str) -> run_rows.RunRow:
        """The row of the run that a create request made.

        Raises:
            ResourceNotFoundError: it made none for this caller.
        """
        made = await self.executors.io(
            self.db.read, lambda tx: run_rows.find_run_by_request(tx, caller.tenant, request_id)
        )
        if made is None:
            raise run_not_found(request_id)
        return await self.row(caller, made.run_id)

    def in_memory(self, tenant: str, run_id: str) -> bool:
        """Whether a run is loaded."""
        return (tenant, run_id) in self._runs

    async def _get_once(self, caller: Caller, run_id: str) -> Run:
        tenant = caller.tenant
        async with self._locks.setdefault((tenant, run_id), asyncio.Lock()):
            run = self._runs.get((tenant, run_id))
            if run is None:
                await self._make_room(tenant)
                run = await self._restore(await self.row(caller, run_id))
                self._runs[(tenant, run_id)] = run
        self._locks.pop((tenant, run_id), None)
        return run

    async def row(self, caller: Caller, run_id: str) -> run_rows.RunRow:
        """The durable row of a run that the caller may see.

        Raises:
            ResourceNotFoundError: there is none for this caller.
        """
        row = await self.executors.io(self.db.read, lambda tx: run_rows.get_run(tx, caller.tenant, run_id))
        if row is None or not await self.executors.io(self._visible, caller, row):
            raise run_not_found(run_id)
        return row

    def _visible(self, caller: Caller, row: run_rows.RunRow) -> bool:
        """Whether a run exists for the caller: a policy admits those that it could have made."""
        policy = caller.policy
        return policy is None or (row.dataset_id == policy.dataset_id and policy.admits(self.config_of(row)))

    async def highest_seq(self, row: run_rows.RunRow) -> int:
        """The number of the last operation that a run which is not in memory knows of."""
        kept = await self.executors.io(
            self.db.read, lambda tx: run_rows.results_after(tx, row.tenant, row.run_id, row.durable_seq)
        )
        return max([row.durable_seq, *(result.seq for result in kept)])

    def config_of(self, row: run_rows.RunRow) -> TrainingConfig:
        """The configuration in a row, without opening it where the run is in memory. Call it off the event loop."""
        run = self._runs.get((row.tenant, row.run_id))
        if run is not None:
            return run.config
        return config_from_json(self.texts.open(row.tenant, CONFIG, row.config_json, row.run_id))

    async def list(self, caller: Caller, *, status: str = "", limit: int, offset: int = 0) -> Page:
        """A page of the runs that the caller may see, newest first, and how many there are in all."""
        if status and status not in (ACTIVE, DONE, "failed"):
            raise InvalidRequestError(
                f"unknown status {status!r}", field="status", constraint="active, completed or failed"
            )
        check_page(limit, offset)
        return await self.executors.io(self._list, caller, status or None, limit, offset)

    def _list(self, caller: Caller, status: str | None, limit: int, offset: int) -> Page:
        policy, tenant = caller.policy, caller.tenant
        if policy is None:
            return self.db.read(
                lambda tx: (
                    run_rows.list_runs(tx, tenant, status=status, dataset_id=None, limit=limit, offset=offset),
                    run_rows.count_runs(tx, tenant, status=status),
                )
            )
        rows = self.db.read(
            lambda tx: run_rows.list_runs(
                tx, tenant, status=status, dataset_id=policy.dataset_id, limit=None, offset=0
            )
        )
        rows = [row for row in rows if self._visible(caller, row)]
        return rows[offset : offset + limit], len(rows)

    async def unload(self, caller: Caller, run_id: str) -> run_rows.RunRow:
        """Free the run's memory and complete it. Checkpoints, the ledger and the results stay."""
        await self.row(caller, run_id)
        tenant = caller.tenant

        def write(tx: Transaction) -> None:
            run_rows.update_run(tx, tenant, run_id, status=DONE, updated=now())

        await _whole(self._end(tenant, run_id, write))
        return await self.row(caller, run_id)

    async def delete(self, caller: Caller, run_id: str) -> None:
        """Forget the run and its results. Checkpoints stay, and so does what was spent."""
        row = await self.row(caller, run_id)
        tenant = caller.tenant

        def write(tx: Transaction) -> None:
            run_rows.update_run(tx, tenant, run_id, status="deleted", state_artifact_id=None, updated=now())
            run_rows.delete_results(tx, tenant, run_id)

        await _whole(self._end(tenant, run_id, write))
        if row.state_artifact_id:  # a step that was running may have left a newer one, which the next start sweeps
            await self.executors.io(self.durability.delete_state, tenant, row.state_artifact_id)

    async def close(self, grace_s: float) -> None:
        """Let running operations end; waiting ones are sent again by their clients."""
        await asyncio.gather(*(r.lane.close(None, grace_s=grace_s) for r in self._runs.values()))
        self._runs.clear()

    async def _create(
        self, caller: Caller, request_id: str, config: TrainingConfig, checkpoint_id: str, optimizer: bool | None
    ) -> Run:
        tenant = caller.tenant
        active = await self.executors.io(self.db.read, lambda tx: run_rows.count_active(tx, tenant))
        if active >= self.max_runs_per_tenant:
            raise RateLimitedError(
                f"{active} training clients are active, the limit of this server; unload or delete one",
                retry_after=30.0,
            )
        await self._make_room(tenant)
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
        self._runs[(tenant, run_id)] = run
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

    def _with_dataset(self, tenant: str, config: TrainingConfig) -> TrainingConfig:
        """The configuration with what the registration of its dataset says about the size."""
        dp = config.dp_config
        if dp is None or not dp.enabled:
            return config
        row = self._registered(tenant, dp.dataset_id) if dp.dataset_id else None
        return with_dataset(config, dp, row)

    async def _restore(self, row: run_rows.RunRow) -> Run:
        config = await self.executors.io(self.config_of, row)
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

    async def _end(self, tenant: str, run_id: str, write: Callable[[Transaction], None]) -> None:
        """Close the lane, write the row, then free the memory: until then nobody restores a second copy.

        Together with the row goes what came of every operation, those that were waiting included.
        """
        outcomes: Callable[[], list[run_rows.ResultRow]] = list
        run = self._runs.get((tenant, run_id))
        if run is not None:
            ended = InvalidRequestError(
                f"training client {run_id} was unloaded", field="training_client_id", constraint="active"
            )
            await run.lane.close(ended, grace_s=MAX_OPERATION_S)
            outcomes = self.durability.unkept_rows(run)

        def seal_and_write() -> None:
            rows = outcomes()
            self.db.write(lambda tx: write_all(tx, rows))

        def write_all(tx: Transaction, rows: list[run_rows.ResultRow]) -> None:
            run_rows.put_results(tx, rows)
            write(tx)

        try:
            await self.executors.io(seal_and_write)
        finally:  # also where the row could not be written: the next call restores the run from disk
            if run is not None and self._runs.pop((tenant, run_id), None) is not None:
                await self.executors.compute(run.session.close)

    async def _make_room(self, tenant: str) -> None:
        """Forget idle completed runs of a tenant that were only looked at or sampled from."""
        mine = [r for (owner, _), r in self._runs.items() if owner == tenant]
        if len(mine) < self.max_runs_per_tenant:
            return
        busy = {key for key, lock in self._locks.items() if lock.locked()}
        idle = [r for r in mine if r.status != ACTIVE and r.lane.idle and (tenant, r.run_id) not in busy]
        if not idle:
            raise RateLimitedError(
                f"{len(mine)} training clients of this tenant are in memory; unload some", retry_after=30.0
            )
        run, key = idle[0], (tenant, idle[0].run_id)
        # Nobody holds this lock, so it is taken at once; who asks for the run meanwhile waits until it is put away.
        async with self._locks.setdefault(key, asyncio.Lock()):
            del self._runs[key]
            await run.lane.close(None)
            await self.executors.io(self._keep_outcomes, run)
            await self.executors.compute(run.session.close)

    def _keep_outcomes(self, run: Run) -> None:
        """Its client need not send again what ended only in memory, and would not: the server is the same."""
        rows = self.durability.unkept_rows(run)()
        self.db.write(lambda tx: run_rows.put_results(tx, rows))


def _check_request_id(request_id: str) -> None:
    if not 1 <= len(request_id) <= MAX_REQUEST_ID:
        raise InvalidRequestError(
            f"request_id must have 1 to {MAX_REQUEST_ID} characters",
            field="request_id",
            constraint=f"1 to {MAX_REQUEST_ID} characters",
        )


def _configuration(state: Mapping[str, Any], base_model: str, metadata: Mapping[str, Any] | None) -> TrainingConfig:
    """The configuration of the run that goes on from a checkpoint; what the old one spent, the new one shares."""
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


async def _whole(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end even if the caller hangs up half-way."""
    return await asyncio.shield(asyncio.ensure_future(work))

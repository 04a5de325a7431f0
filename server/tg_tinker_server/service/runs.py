"""The life of training runs: create, find (also after a restart), list, unload, delete."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tg_tinker.errors import InvalidRequestError, RateLimitedError, ResourceNotFoundError
from tg_tinker.types import TrainingConfig
from tg_tinker.types.info import ModelInfo
from tg_tinker.wire.runs import config_from_json
from tg_tinker_server.service.caller import Caller
from tg_tinker_server.service.checkpoints import CheckpointService, check_page
from tg_tinker_server.service.durability import Durability, now
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.service.paths import CONFIG
from tg_tinker_server.service.resident_runs import ResidentRuns
from tg_tinker_server.service.run import ACTIVE, DONE, Run
from tg_tinker_server.service.run_factory import RunFactory, configuration_from
from tg_tinker_server.service.sealed_text import SealedText
from tg_tinker_server.store import run_rows
from tg_tinker_server.store.artifact_rows import ArtifactRow
from tg_tinker_server.store.database import Database, Transaction

T = TypeVar("T")
Page = tuple[list[run_rows.RunRow], int]
MAX_REQUEST_ID = 128


def run_not_found(run_id: str) -> ResourceNotFoundError:
    """The one answer for a missing run and for another tenant's."""
    return ResourceNotFoundError(
        "no such training client for this tenant", resource_type="training_client", resource_id=run_id
    )


@dataclass(frozen=True, slots=True)
class RunRegistry:
    """The runs of all tenants, in memory or on disk, as their callers may see them."""

    db: Database
    texts: SealedText
    durability: Durability
    checkpoints: CheckpointService
    executors: Executors
    factory: RunFactory
    resident: ResidentRuns
    _models: list[ModelInfo] = field(default_factory=list)

    async def models(self) -> list[ModelInfo]:
        """What is offered. Asked once: later calls wait for nobody's training."""
        if not self._models:
            self._models[:] = await self.executors.compute(self.factory.backend.models)
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
        made = await self._made(caller.tenant, request_id)
        if made is not None:
            return await self.get(caller, made.run_id)
        row = await self.checkpoints.row(caller, path)
        _, state = await self.checkpoints.open(caller.tenant, row.artifact_id)
        config = configuration_from(state, base_model, metadata)
        return await self.create(caller, request_id, config, path, optimizer)

    async def _create_once(
        self, caller: Caller, request_id: str, config: TrainingConfig, checkpoint_id: str, optimizer: bool | None
    ) -> Run:
        # One create of a tenant at a time: neither a repeated request nor the limit of runs can be raced.
        tenant = caller.tenant
        async with self.resident.lock(tenant):
            made = await self._made(tenant, request_id)
            config = await self.executors.io(self.factory.with_dataset, tenant, config)
            if made is not None:
                run = await self.get(caller, made.run_id)
                if run.config.model_dump() != config.model_dump():
                    raise InvalidRequestError(
                        "this request_id made a training client with another configuration",
                        field="request_id",
                        constraint="one configuration per request_id",
                    )
                return run
            active = await self.executors.io(self.db.read, lambda tx: run_rows.count_active(tx, tenant))
            if active >= self.resident.max_runs_per_tenant:
                raise RateLimitedError(
                    f"{active} training clients are active, the limit of this server; unload or delete one",
                    retry_after=30.0,
                )
            await self.resident.make_room(tenant)
            run = await self.factory.create(caller, request_id, config, checkpoint_id, optimizer)
            self.resident.add(run)
            return run

    async def _made(self, tenant: str, request_id: str) -> run_rows.RunRow | None:
        """The run that a request has made."""
        return await self.executors.io(self.db.read, lambda tx: run_rows.find_run_by_request(tx, tenant, request_id))

    async def get(self, caller: Caller, run_id: str) -> Run:
        """A run that the caller may see, restored from its last settled state if this process does not hold it yet.

        Raises:
            ResourceNotFoundError: there is none for this caller.
        """
        run = self.resident.get(caller.tenant, run_id)
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
        made = await self._made(caller.tenant, request_id)
        if made is None:
            raise run_not_found(request_id)
        return await self.row(caller, made.run_id)

    def in_memory(self, tenant: str, run_id: str) -> bool:
        """Whether a run is loaded."""
        return self.resident.get(tenant, run_id) is not None

    async def _get_once(self, caller: Caller, run_id: str) -> Run:
        tenant = caller.tenant
        async with self.resident.lock(tenant, run_id):
            run = self.resident.get(tenant, run_id)
            if run is None:
                await self.resident.make_room(tenant)
                row = await self.row(caller, run_id)
                run = await self.factory.restore(row, await self.executors.io(self.config_of, row))
                self.resident.add(run)
        self.resident.drop_lock(tenant, run_id)
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
        run = self.resident.get(row.tenant, row.run_id)
        if run is not None:
            return run.config
        return config_from_json(self.texts.open(row.tenant, CONFIG, row.config_json, row.run_id))

    async def config_behind(self, row: ArtifactRow) -> TrainingConfig:
        """The configuration of a checkpoint that the caller may see; it outlives its run.

        Raises:
            InvalidRequestError: it came from elsewhere, without a configuration.
        """
        run = await self.executors.io(
            self.db.read, lambda tx: run_rows.get_run_of_any_status(tx, row.tenant, row.run_id)
        )
        if run is not None:
            return await self.executors.io(self.config_of, run)
        _, state = await self.checkpoints.open(row.tenant, row.artifact_id)
        return configuration_from(state, "", None)

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

        await _whole(self.resident.end(tenant, run_id, write))
        return await self.row(caller, run_id)

    async def delete(self, caller: Caller, run_id: str) -> None:
        """Forget the run and its results. Checkpoints stay, and so does what was spent."""
        row = await self.row(caller, run_id)
        tenant = caller.tenant

        def write(tx: Transaction) -> None:
            run_rows.update_run(tx, tenant, run_id, status="deleted", state_artifact_id=None, updated=now())
            run_rows.delete_results(tx, tenant, run_id)

        await _whole(self.resident.end(tenant, run_id, write))
        if row.state_artifact_id:  # a step that was running may have left a newer one, which the next start sweeps
            await self.executors.io(self.durability.delete_state, tenant, row.state_artifact_id)

    async def close(self, grace_s: float) -> None:
        """Let running operations end; waiting ones are sent again by their clients."""
        await self.resident.close(grace_s)


def _check_request_id(request_id: str) -> None:
    if not 1 <= len(request_id) <= MAX_REQUEST_ID:
        raise InvalidRequestError(
            f"request_id must have 1 to {MAX_REQUEST_ID} characters",
            field="request_id",
            constraint=f"1 to {MAX_REQUEST_ID} characters",
        )


async def _whole(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end even if the caller hangs up half-way."""
    return await asyncio.shield(asyncio.ensure_future(work))

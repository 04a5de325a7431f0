"""The gateway put together: one Starlette application over the services of a server."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog
from starlette.applications import Starlette

from tg_tinker.errors import TGTinkerError
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.crypto.envelope import TenantKeyring
from tg_tinker_server.gateway.callers import Callers
from tg_tinker_server.gateway.doors import Doors, not_here
from tg_tinker_server.gateway.external import ExternalDoors
from tg_tinker_server.gateway.futures import Futures
from tg_tinker_server.gateway.listener import HttpListener
from tg_tinker_server.gateway.models import Models
from tg_tinker_server.gateway.rest_doors import RestDoors
from tg_tinker_server.gateway.samples import Samples
from tg_tinker_server.gateway.sampling_doors import SamplingDoors
from tg_tinker_server.gateway.service_doors import ServiceDoors
from tg_tinker_server.gateway.sessions import Sessions
from tg_tinker_server.gateway.training import Training
from tg_tinker_server.gateway.training_doors import TrainingDoors
from tg_tinker_server.ledger.audit import AuditLog
from tg_tinker_server.service.caller import Authenticator
from tg_tinker_server.service.checkpoints import CheckpointService
from tg_tinker_server.service.custom_losses import CustomLosses
from tg_tinker_server.service.dispatch import Dispatch
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.service.journal import Journal
from tg_tinker_server.service.operations import OperationService
from tg_tinker_server.service.run_info import RunInfos
from tg_tinker_server.service.runs import RunRegistry
from tg_tinker_server.service.samplers import SamplerService
from tg_tinker_server.service.training import TrainingService
from tg_tinker_server.service.weight_files import WeightFiles
from tg_tinker_server.store.database import Database

log = structlog.get_logger()
SWEEP_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What the gateway calls.

    Attributes:
        system_tenant: under whose key URLs are sealed.
        hub_ids, scratch: as in ``WeightFiles``.
    """

    db: Database
    keyring: TenantKeyring
    executors: Executors
    authenticator: Authenticator
    registry: RunRegistry
    operations: OperationService
    dispatch: Dispatch
    training: TrainingService
    checkpoints: CheckpointService
    samplers: SamplerService
    losses: CustomLosses
    infos: RunInfos
    audit: AuditLog
    system_tenant: str
    hub_ids: Mapping[str, str]
    scratch: Path


class Gateway:
    """The Tinker API of a server: a listener, and what it has accepted and not ended yet."""

    def __init__(self, config: ServerConfig, services: Services) -> None:
        assert config.tinker_port is not None
        s, io = services, services.executors
        sessions = Sessions(s.db, s.keyring, io)
        journal = Journal(s.db, s.keyring, io)
        self._models = Models(s.db, io, s.registry, sessions, journal)
        self._training = Training(
            self._models, s.dispatch, s.operations, s.training, journal, Callers(s.db, io), config.tinker_gap_s
        )
        self._samples = Samples(s.samplers)
        self._futures = futures = Futures(self._models, self._training, self._samples, s.samplers)
        files = WeightFiles(s.checkpoints.vault, s.audit, io, s.scratch, s.hub_ids)
        handlers = {
            **ServiceDoors(
                sessions, self._samples, s.registry, config.tinker_zstd, config.backend == "torch"
            ).handlers(),
            **TrainingDoors(sessions, self._training, futures, s.losses, s.infos).handlers(),
            **SamplingDoors(sessions, s.samplers, self._samples, futures).handlers(),
            **RestDoors(s.registry, s.checkpoints, s.audit).handlers(),
            **ExternalDoors(s.system_tenant, s.keyring, s.checkpoints, files).handlers(),
        }
        doors = Doors(s.authenticator, io, config.max_request_bytes, config.tinker_zstd)
        app = Starlette(routes=doors.routes(handlers), exception_handlers={404: not_here, 405: not_here})
        self._listener = HttpListener(config, app, port=config.tinker_port)
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def url(self) -> str:
        """What clients take as base_url."""
        return self._listener.url

    async def start(self) -> None:
        """Accept calls, and go on with what was acknowledged before."""
        await self._listener.start()
        self._tasks = [
            asyncio.create_task(self._resume(), name="tinker-resume"),
            asyncio.create_task(self._sweep(), name="tinker-sweep"),
        ]

    async def stop(self, grace_s: float) -> None:
        """Refuse calls. What was acknowledged and has not ended is on disk; samples are sent again."""
        for task in self._tasks:
            task.cancel()
        await self._samples.close()
        await self._models.close()
        await self._listener.stop(grace_s)
        await self._training.close()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self._samples.forget_silent()

    async def _resume(self) -> None:
        try:
            await self._training.resume_all()
        except TGTinkerError as e:
            log.error("requests_not_resumed", error=e.code)

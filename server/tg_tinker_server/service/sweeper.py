"""Deletes checkpoints whose time is over. They are missing from that moment; here their bytes go."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import structlog

from tg_tinker_server.service.checkpoints import CheckpointService
from tg_tinker_server.service.durability import now
from tg_tinker_server.store import artifact_rows

log = structlog.get_logger()
EVERY_S = 60.0
_AT_ONCE = 200


@dataclass(frozen=True, slots=True)
class Sweeper:
    """Sweeps at the start and each minute."""

    checkpoints: CheckpointService

    def sweep(self) -> int:
        """Delete what has expired; returns how many. Call it off the event loop."""
        swept = 0
        while found := self.checkpoints.db.read(
            lambda tx: artifact_rows.expired_artifacts(tx, now(), limit=_AT_ONCE)
        ):
            for tenant, artifact_id in found:
                self.checkpoints.erase(tenant, artifact_id)
            swept += len(found)
        return swept

    async def run(self) -> None:
        """Sweep each minute until cancelled. A sweep that fails is tried again."""
        while True:
            await asyncio.sleep(EVERY_S)
            try:
                await self.checkpoints.executors.io(self.sweep)
            except Exception as e:  # noqa: BLE001 - a full disk today is none tomorrow
                log.warning("sweep_failed", error=type(e).__name__)

"""Samplers: durable names for frozen weights, and who may sample from them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

import structlog

from tg_tinker.errors import InvalidRequestError, RateLimitedError, ResourceNotFoundError
from tg_tinker.types import TrainingConfig
from tg_tinker.types.info import ModelInfo
from tg_tinker.types.tokens import SampleEvent, SampleQuery, SampleResponse, response_of
from tg_tinker.wire.runs import config_from_json
from tg_tinker.wire.tokens import SamplerInfo
from tg_tinker_server.config import SharePasses
from tg_tinker_server.engine.backend import Backend
from tg_tinker_server.engine.sampling.seam import SampledWeights, SamplingBackend
from tg_tinker_server.service.caller import Caller
from tg_tinker_server.service.checkpoints import CheckpointService
from tg_tinker_server.service.durability import new_id, now
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.service.sampling_loop import SamplingLoop
from tg_tinker_server.service.sealed_text import SealedText
from tg_tinker_server.store import sampler_rows
from tg_tinker_server.store.database import Database, Transaction

log = structlog.get_logger()
PATH: Final = "sampler-path"
MAX_ID: Final = 128
MOST_SAMPLERS: Final = 100_000
"""Rows of one tenant."""
MOST_WAITING: Final = 1024
"""Requests under way in the whole server, half of them of one tenant."""
MOST_OPEN: Final = 64
"""Adapters in memory that nobody uses just now."""
MOST_OPEN_BYTES: Final = 4 * 2**30


def sampler_not_found(sampler_id: str) -> ResourceNotFoundError:
    """The one answer for a missing sampler and for another tenant's."""
    return ResourceNotFoundError("no such sampler for this tenant", resource_type="sampler", resource_id=sampler_id)


@dataclass(eq=False, slots=True)
class _Open:
    """Weights in memory, and how many requests use them."""

    weights: SampledWeights
    users: int = 0


class SamplerService:
    """Samplers of all tenants.

    A sampler is a name for weights that do not change: a base model, or an artifact. Its row outlives the process;
    its weights are in memory while somebody samples, and as long after as there is room.
    """

    def __init__(
        self,
        db: Database,
        texts: SealedText,
        checkpoints: CheckpointService,
        backend: Backend,
        models: Callable[[], Awaitable[list[ModelInfo]]],
        executors: Executors,
        loop: SamplingLoop,
        share: SharePasses,
        *,
        most_waiting: int = MOST_WAITING,
    ) -> None:
        self._db, self._texts, self._checkpoints = db, texts, checkpoints
        self._backend, self._models, self._executors, self._share = backend, models, executors, share
        self._most_waiting = most_waiting
        self._waiting: dict[str, int] = {}
        self._open: dict[tuple[str, str, str], _Open] = {}
        self._opening = asyncio.Lock()
        self._loop = loop

    async def create(
        self, caller: Caller, *, sampler_id: str = "", base_model: str = "", path: str = ""
    ) -> SamplerInfo:
        """Name a base model or saved weights; a repeated ``sampler_id`` gets what the first call made.

        Raises:
            InvalidRequestError: not exactly one of the two, a base model that is not offered, or an id that names
                other weights already.
            ResourceNotFoundError: no such weights.
            RateLimitedError: too many samplers.
        """
        if bool(base_model) == bool(path):
            raise InvalidRequestError(
                "a sampler is of a base model or of saved weights; give base_model or path, and not both",
                field="path",
                constraint="exactly one of base_model and path",
            )
        if len(sampler_id) > MAX_ID:
            raise InvalidRequestError(
                f"sampler_id has {len(sampler_id)} characters", field="sampler_id", constraint=f"at most {MAX_ID}"
            )
        artifact_id = ""
        if path:
            artifact_id, base_model = await self._saved(caller, path)
        elif base_model not in (offered := [m.name for m in await self._models()]):
            raise InvalidRequestError(
                f"model {base_model!r} is not offered here; offered: {', '.join(sorted(offered))}",
                field="base_model",
                constraint="one of: " + ", ".join(sorted(offered)),
            )
        info = SamplerInfo(sampler_id=sampler_id or new_id("smp"), base_model=base_model, path=path)
        row = await self._executors.io(self._insert, caller.tenant, info, artifact_id)
        if (row.base_model, row.artifact_id) != (base_model, artifact_id):
            raise InvalidRequestError(
                "this sampler_id names other weights already", field="sampler_id", constraint="one set of weights"
            )
        return info

    async def get(self, caller: Caller, sampler_id: str) -> SamplerInfo:
        """What a sampler names.

        Raises:
            ResourceNotFoundError: there is none for this tenant, or its weights are gone.
        """
        row = await self._row(caller, sampler_id)
        path = await self._executors.io(self._path_of, row)
        return SamplerInfo(sampler_id=sampler_id, base_model=row.base_model, path=path)

    async def delete(self, caller: Caller, sampler_id: str) -> None:
        """Forget a sampler. Requests under way end as they would have.

        Raises:
            ResourceNotFoundError: there is none for this tenant.
        """
        await self._row(caller, sampler_id)
        await self._executors.io(
            self._db.write, lambda tx: sampler_rows.delete_sampler(tx, caller.tenant, sampler_id)
        )

    async def sample(self, caller: Caller, sampler_id: str, query: SampleQuery) -> SampleResponse:
        """Sample, and wait for all of it. Who stops waiting takes the request out of the model's batch.

        Raises:
            ResourceNotFoundError: no such sampler, or its weights are gone.
            InvalidRequestError: the prompt does not fit the model, or its weights have diverged.
            RateLimitedError: too many requests are under way.
        """
        return response_of([event async for event in self.stream(caller, sampler_id, query)])

    async def stream(self, caller: Caller, sampler_id: str, query: SampleQuery) -> AsyncIterator[SampleEvent]:
        """Sample, and yield tokens as they come; last, what was found about the prompt. Raises as ``sample``."""
        async with aclosing(self.slices(caller, sampler_id, query)) as slices:
            async for events in slices:
                for event in events:
                    yield event

    async def slices(
        self, caller: Caller, sampler_id: str, query: SampleQuery
    ) -> AsyncGenerator[tuple[SampleEvent, ...]]:
        """As ``stream``, with what came of one slice together."""
        self._ensure_room(caller.tenant)
        self._waiting[caller.tenant] = self._waiting.get(caller.tenant, 0) + 1
        used: _Open | None = None
        try:
            used = await self._weights_of(caller.tenant, await self._row(caller, sampler_id))
            group = {"everyone": "everyone", "tenant": caller.tenant, "off": object()}[self._share]
            async with aclosing(self._loop.slices(used.weights, [query], group)) as slices:
                async for events in slices:
                    yield events
        finally:
            if used is not None:
                used.users -= 1
            self._waiting[caller.tenant] -= 1
            if not self._waiting[caller.tenant]:
                del self._waiting[caller.tenant]

    async def encode(self, caller: Caller, sampler_id: str, texts: list[str]) -> list[list[int]]:
        """Texts to token ids of a sampler's model."""
        used = await self._weights_of(caller.tenant, await self._row(caller, sampler_id))
        try:
            return await self._executors.compute(lambda: [used.weights.encode(t) for t in texts])
        finally:
            used.users -= 1

    async def decode(self, caller: Caller, sampler_id: str, ids: list[list[int]]) -> list[str]:
        """Token ids to texts of a sampler's model."""
        used = await self._weights_of(caller.tenant, await self._row(caller, sampler_id))
        try:
            size = used.weights.vocab_size
            if any(not 0 <= i < size for row in ids for i in row):
                raise InvalidRequestError(
                    f"a token id is outside 0 to {size - 1}", field="ids", constraint=f"0 <= id < {size}"
                )
            return await self._executors.compute(lambda: [used.weights.decode(row) for row in ids])
        finally:
            used.users -= 1

    # Rows.

    async def _row(self, caller: Caller, sampler_id: str) -> sampler_rows.SamplerRow:
        row = await self._executors.io(
            self._db.read, lambda tx: sampler_rows.get_sampler(tx, caller.tenant, sampler_id)
        )
        if row is None:
            raise sampler_not_found(sampler_id)
        if row.artifact_id:  # deleted since, or not for this key
            await self._checkpoints.row(caller, row.artifact_id)
        return row

    async def _saved(self, caller: Caller, path: str) -> tuple[str, str]:
        """Artifact and base model of a path."""
        artifact = await self._checkpoints.row(caller, path)
        _, state = await self._checkpoints.open(caller.tenant, artifact.artifact_id)
        return artifact.artifact_id, str(state["config"]["model_ref"])

    def _insert(self, tenant: str, info: SamplerInfo, artifact_id: str) -> sampler_rows.SamplerRow:
        row = sampler_rows.SamplerRow(
            tenant=tenant,
            sampler_id=info.sampler_id,
            base_model=info.base_model,
            artifact_id=artifact_id,
            path=self._texts.seal(tenant, PATH, info.path, info.sampler_id),
            created=now(),
        )

        def write(tx: Transaction) -> sampler_rows.SamplerRow:
            found = sampler_rows.get_sampler(tx, tenant, info.sampler_id)
            if found is not None:
                return found
            if sampler_rows.count_samplers(tx, tenant) >= MOST_SAMPLERS:
                raise RateLimitedError(
                    f"this tenant has {MOST_SAMPLERS} samplers, the most there can be; delete some", retry_after=60.0
                )
            sampler_rows.insert_sampler(tx, row)
            return row

        return self._db.write(write)

    def _path_of(self, row: sampler_rows.SamplerRow) -> str:
        return self._texts.open(row.tenant, PATH, row.path, row.sampler_id)

    # Weights in memory.

    async def _weights_of(self, tenant: str, row: sampler_rows.SamplerRow) -> _Open:
        """The weights of a row, in use by one more. Tenants share a base model, but no handle: what one of them has
        sent must not show in how fast another is answered.
        """
        key = (tenant, row.base_model, row.artifact_id)
        if key not in self._open:
            async with self._opening:
                if key not in self._open:
                    await self._make_room()
                    self._open[key] = _Open(await self._read_weights(tenant, row))
        used = self._open[key] = self._open.pop(key)  # now the latest
        used.users += 1
        return used

    async def _read_weights(self, tenant: str, row: sampler_rows.SamplerRow) -> SampledWeights:
        backend = self._backend
        if not isinstance(backend, SamplingBackend):
            raise InvalidRequestError(
                "the models of this server cannot be sampled by token",
                field="sampler_id",
                constraint="another server",
            )
        if not row.artifact_id:
            config = TrainingConfig(model_ref=row.base_model)
            return await self._executors.compute(backend.open_weights, config, None)
        engine, state = await self._checkpoints.open(tenant, row.artifact_id)
        config = config_from_json(json.dumps(state["config"]))
        return await self._executors.compute(backend.open_weights, config, engine)

    async def _make_room(self) -> None:
        """Put away what was longest out of use; whoever is needed now stays."""
        while (
            len(self._open) >= MOST_OPEN or sum(o.weights.size_bytes for o in self._open.values()) > MOST_OPEN_BYTES
        ):
            oldest = next((key for key, open_ in self._open.items() if not open_.users), None)
            if oldest is None:
                raise RateLimitedError("all weights in memory are being sampled from", retry_after=2.0)
            await self._loop.put_away(self._open.pop(oldest).weights)

    # Requests under way.

    def _ensure_room(self, tenant: str) -> None:
        self._loop.ensure_open()
        mine, all_ = self._waiting.get(tenant, 0), sum(self._waiting.values())
        if all_ >= self._most_waiting or mine >= max(1, self._most_waiting // 2):
            raise RateLimitedError(
                f"{mine} requests of this tenant and {all_} in all are being sampled; try again soon", retry_after=1.0
            )

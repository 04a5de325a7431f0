"""Models of the protocol: each is a run whose request_id is made of the model's id, so that a repetition finds it."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from dataclasses import dataclass, field
from typing import Any

import structlog

from tg_tinker.errors import InvalidRequestError, ResourceNotFoundError, ServerError, TGTinkerError
from tg_tinker_server.gateway import names
from tg_tinker_server.gateway.calls import canonical
from tg_tinker_server.gateway.errors import bare
from tg_tinker_server.gateway.messages import CreateModel, LoadWeights, read
from tg_tinker_server.gateway.privacy import step_params, training_config
from tg_tinker_server.gateway.requests import parse_json
from tg_tinker_server.gateway.sessions import Sessions
from tg_tinker_server.service.caller import Caller
from tg_tinker_server.service.crashes import place_of
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.service.journal import Entry, Journal
from tg_tinker_server.service.run import Run
from tg_tinker_server.service.runs import RunRegistry
from tg_tinker_server.store import run_rows
from tg_tinker_server.store.database import Database

log = structlog.get_logger()
MOST_MAKINGS = 10_000  # outcomes in memory; older ones are looked up, or made again
CREATE, LOAD = "create_model", "load_weights"


@dataclass(slots=True)
class _Making:
    """A model that is being made, or was made by this process."""

    digest: bytes
    key_id: str
    task: asyncio.Task[str]


@dataclass(frozen=True, slots=True)
class Models:
    """Makes models and finds the runs behind them."""

    db: Database
    executors: Executors
    registry: RunRegistry
    sessions: Sessions
    journal: Journal
    _making: dict[tuple[str, str], _Making] = field(default_factory=dict)
    _run_ids: dict[tuple[str, str], str] = field(default_factory=dict)

    async def create(self, caller: Caller, message: CreateModel, value: Any) -> str:
        """Begin to make a model; returns its id. It is made even if the server stops before."""
        await self.sessions.get(caller, message.session_id)
        model_id = names.model_id(message.session_id, message.model_seq_id)
        return await self._begin(caller, model_id, CREATE, canonical(value))

    async def load(self, caller: Caller, message: LoadWeights, value: Any) -> str:
        """The same for a model that begins with saved weights."""
        if message.session_id is None or message.model_seq_id is None:
            raise InvalidRequestError("session_id or model_seq_id is missing", field="session_id", constraint="given")
        if message.weights_access_token:
            raise InvalidRequestError(
                "weights of other tenants cannot be loaded, and weights_access_token is not known here; leave it out",
                field="weights_access_token",
                constraint="none",
            )
        await self.sessions.get(caller, message.session_id)
        model_id = names.model_id(message.session_id, message.model_seq_id)
        return await self._begin(caller, model_id, LOAD, canonical(value))

    async def _begin(self, caller: Caller, model_id: str, name: str, body: bytes) -> str:
        making = self._making.get((caller.tenant, model_id))
        digest = hashlib.sha256(name.encode() + b"\x00" + body).digest()
        if making is not None:
            if making.digest != digest:
                raise InvalidRequestError(
                    f"{model_id} was made by another request; use the next model_seq_id",
                    field="model_seq_id",
                    constraint="one model per number",
                )
            return model_id
        gate = asyncio.Event()
        task = asyncio.create_task(self._make(caller, model_id, name, body, gate), name=f"create-{model_id}")
        task.add_done_callback(_ended)
        self._making[(caller.tenant, model_id)] = _Making(digest, caller.key_id, task)
        self._tidy()
        try:
            if await self._find(caller.tenant, model_id) is None:
                entry = Entry(model_id=model_id, seq=0, name=name, body=body, actor=caller.key_id)
                await self.journal.keep(caller.tenant, entry)
        except BaseException:
            del self._making[(caller.tenant, model_id)]
            task.cancel()
            raise
        gate.set()
        return model_id

    async def resume(self, caller: Caller, entry: Entry) -> None:
        """Make what was asked for before a restart."""
        await self._begin(caller, entry.model_id, entry.name, entry.body)

    async def _make(self, caller: Caller, model_id: str, name: str, body: bytes, gate: asyncio.Event) -> str:
        await gate.wait()
        try:
            run = await self._made(caller, model_id, name, body)
        except TGTinkerError as e:
            if not (isinstance(e, ServerError) and e.details.get("retry") is True):
                self.journal.drop(caller.tenant, model_id, seqs=(0,))
            raise
        except Exception as e:  # noqa: BLE001 - a defect of ours, told without its text
            log.error("create_crashed", error=type(e).__name__, at=place_of(e))
            raise ServerError(
                "the model could not be made, by a fault inside the server; tell its operator"
            ) from None
        self.journal.drop(caller.tenant, model_id, seqs=(0,))
        self._run_ids[(caller.tenant, model_id)] = run.run_id
        return run.run_id

    async def _made(self, caller: Caller, model_id: str, name: str, body: bytes) -> Run:
        request_id = names.RUN_PREFIX + model_id
        value = parse_json(body)
        if name == CREATE:
            asked = read(CreateModel, value)
            config = await self.executors.io(
                lambda: training_config(
                    base_model=asked.base_model,
                    lora=asked.lora_config,
                    optimizer=asked.optimizer_config,
                    metadata=asked.user_metadata,
                    caller=caller,
                )
            )
            return await self.registry.create(caller, request_id, config)
        load = read(LoadWeights, value)
        if load.optimizer_config not in (None, {"type": "adamw"}):
            await self._check_optimizer(caller, load)
        return await self.registry.create_from(
            caller,
            request_id,
            load.path,
            optimizer=load.optimizer,
            base_model=load.base_model or "",
            metadata=load.user_metadata,
        )

    async def _check_optimizer(self, caller: Caller, load: LoadWeights) -> None:
        """A model that goes on has the privacy of the one before; whoever asks for another is told so."""
        row = await self.registry.checkpoints.row(caller, load.path)
        step_params(await self.registry.config_behind(row), None, load.optimizer_config)

    async def run(self, caller: Caller, model_id: str) -> Run:
        """The run behind a model, once it is made.

        Raises:
            ResourceNotFoundError: there is none for this tenant.
            TGTinkerError: why it could not be made.
        """
        making = self._made_for(caller, model_id)
        if making is not None and not making.task.done():
            await asyncio.wait({making.task})
        run_id = await self._find(caller.tenant, model_id)
        if run_id is None:
            if making is None:
                raise names.not_found("model", model_id)
            run_id = await asyncio.shield(making.task)
        try:
            return await self.registry.get(caller, run_id)
        except ResourceNotFoundError:
            raise names.not_found("model", model_id) from None

    def making(self, caller: Caller, model_id: str) -> asyncio.Task[str] | None:
        """The task that makes a model, if this process has it and the caller may know of it."""
        making = self._made_for(caller, model_id)
        return making.task if making else None

    def _made_for(self, caller: Caller, model_id: str) -> _Making | None:
        """A key with a policy is one party's: why another key's model could not be made is not for it."""
        making = self._making.get((caller.tenant, model_id))
        mine = making is not None and (caller.policy is None or making.key_id == caller.key_id)
        return making if mine else None

    async def _find(self, tenant: str, model_id: str) -> str | None:
        known = self._run_ids.get((tenant, model_id))
        if known is not None or not names.is_model(model_id):
            return known
        request_id = names.RUN_PREFIX + model_id
        row = await self.executors.io(self.db.read, lambda tx: run_rows.find_run_by_request(tx, tenant, request_id))
        if row is not None:
            self._run_ids[(tenant, model_id)] = row.run_id
        return None if row is None else row.run_id

    def _tidy(self) -> None:
        for key in list(itertools.islice(self._making, max(0, len(self._making) - MOST_MAKINGS))):
            if self._making[key].task.done():
                del self._making[key]

    async def close(self) -> None:
        """Let models that are being made be made."""
        tasks = [m.task for m in self._making.values() if not m.task.done()]
        if tasks:
            await asyncio.wait(tasks, timeout=10.0)


def _ended(task: asyncio.Task[str]) -> None:
    """What went wrong is asked for later, or never; it is kept without the request."""
    if not task.cancelled() and isinstance(error := task.exception(), TGTinkerError):
        bare(error)

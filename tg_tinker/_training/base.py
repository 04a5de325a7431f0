"""What every part of a TrainingClient stands on: the run, its session, the way to the server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Self

from tg_tinker._pressure import QueueState
from tg_tinker._transport import Transport
from tg_tinker.chunking import Joined
from tg_tinker.errors import InvalidRequestError, ResourceNotFoundError
from tg_tinker.futures import FutureHandle
from tg_tinker.privacy_view import PrivacyView
from tg_tinker.session import Session
from tg_tinker.types import TrainingConfig
from tg_tinker.types.run import RunInfo
from tg_tinker.wire import requests
from tg_tinker.wire.calls import Call
from tg_tinker.wire.runs import run_info_from_proto


class RunHandle:
    """One run as this process holds it."""

    def __init__(self, transport: Transport, session: Session, info: RunInfo) -> None:
        self._transport = transport
        self._session = session
        self._config = info.config
        self._unit_key = info.unit_key
        self._training = True
        self._unloaded = False

    @property
    def id(self) -> str:
        """Unique identifier of this training client."""
        return self._session.run_id

    @property
    def config(self) -> TrainingConfig:
        """The configuration it was created with, defaults filled in."""
        return self._config

    @property
    def step(self) -> int:
        """Optimizer steps taken. Asks the server while steps are under way whose results were not seen."""
        return self._session.step if self._session.step_is_current else self.get_info().step

    @property
    def status(self) -> str:
        """Current status: "active", "completed" or "failed"."""
        return self.get_info().status

    @property
    def privacy(self) -> PrivacyView:
        """What the run's dataset has spent, and what more steps would cost.

        Raises:
            InvalidRequestError: the run has no differential privacy.
        """
        if not self._config.private:
            raise InvalidRequestError(
                "this training client has no differential privacy; create one with TrainingConfig(dp_config=...)",
                field="dp_config",
                constraint="enabled",
            )
        return PrivacyView(self._transport, self.id)

    @property
    def queue_state(self) -> QueueState:
        """Whether the server takes work, as it said last. Waiting calls go on by themselves."""
        return self._transport.pressure.state

    def get_info(self) -> RunInfo:
        """The run as the server sees it now: model, adapter, step, status, budget, sizes."""
        return self._saw(self._transport.call(requests.get_run(self.id)))

    async def get_info_async(self) -> RunInfo:
        """Like ``get_info``."""
        return self._saw(await asyncio.wrap_future(self._transport.send(requests.get_run(self.id))))

    def close(self, *, wait_s: float = 60.0) -> None:
        """Take no more calls. Calls already made are handed to the server first, for up to ``wait_s`` seconds."""
        self._session.close(wait_s=wait_s)

    def __enter__(self) -> Self:
        return self

    def __repr__(self) -> str:
        return f"<TrainingClient {self.id} {self._config.model_ref}>"

    def _submit(self, call: Call) -> FutureHandle:
        self._require_loaded()
        return FutureHandle(self._session.submit(call))

    def _submit_all(self, calls: Sequence[Call], finish: Callable[[list[Any]], Any]) -> FutureHandle:
        self._require_loaded()
        return FutureHandle(Joined(self._session.submit_all(calls), finish))

    def _require_loaded(self) -> None:
        if self._unloaded:
            raise ResourceNotFoundError(
                f"{self.id} was unloaded; create a training client from one of its checkpoints",
                resource_type="training_client",
                resource_id=self.id,
            )

    def _saw(self, reply: Any) -> RunInfo:
        info = run_info_from_proto(reply)
        self._session.saw_run(info)
        return info

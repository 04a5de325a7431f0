"""ServiceClient: the way in. Creates and finds training clients, artifacts, ledgers, audit logs."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any

from tg_tinker._arguments import lora_config
from tg_tinker._service.artifacts import Artifacts
from tg_tinker._service.data import Data
from tg_tinker.custom.trace import LossHandle, trace_loss
from tg_tinker.elsewhere import Elsewhere
from tg_tinker.errors import InvalidRequestError, ResourceNotFoundError
from tg_tinker.futures import FutureHandle
from tg_tinker.rest_client import RestClient
from tg_tinker.sampling_client import RetryConfig, SamplingClient
from tg_tinker.session import Session
from tg_tinker.training_client import TrainingClient
from tg_tinker.types import Capabilities, DPConfig, TrainingClientInfo, TrainingConfig
from tg_tinker.types.run import RunInfo
from tg_tinker.wire import requests
from tg_tinker.wire.operations import UNKNOWN, future_from_proto, get_future_request
from tg_tinker.wire.runs import run_info_from_proto


class ServiceClient(Artifacts, Data):
    """A connection to one server, shared by threads. Nothing is sent before the first call.

    >>> service = ServiceClient(base_url="localhost:50051")
    >>> service.config.tls
    False
    """

    def create_training_client(self, config: TrainingConfig, checkpoint_id: str | None = None) -> TrainingClient:
        """Create a run.

        Args:
            checkpoint_id: start from this artifact.

        Raises:
            InvalidRequestError: the server cannot do what the configuration asks for; it names the field.
            DPBudgetExceededError: the dataset's budget does not allow a single step.
        """
        self._handshake()
        if self._user_metadata:
            config = config.model_copy(update={"metadata": {**self._user_metadata, **config.metadata}})
        request = requests.create_run(uuid.uuid4().hex, config, checkpoint_id)
        info = run_info_from_proto(self._transport.call(request, attempt_s=self._config.timeout))
        return self._client(info, takeover=False)

    async def create_training_client_async(
        self, config: TrainingConfig, checkpoint_id: str | None = None
    ) -> TrainingClient:
        """Like ``create_training_client``."""
        return await asyncio.to_thread(self.create_training_client, config, checkpoint_id)

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: Mapping[str, Any] | None = None,
        *,
        dp_config: DPConfig | None = None,
        **settings: Any,
    ) -> TrainingClient:
        """Create a run that trains an adapter on groups of modules; alpha is 32.

        Args:
            rank: of the adapter.
            seed: of its first values; the same seed gives the same bits.
            train_mlp, train_attn, train_unembed: feed-forward layers, attention projections, output layer.
            user_metadata: stored with the run.
            dp_config: trains with differential privacy.
            settings: other fields of ``TrainingConfig``, as ``batch_size``.

        Raises:
            InvalidRequestError: a setting that cannot be, or a group that the model does not have.
        """
        adapter = lora_config(rank, train_mlp=train_mlp, train_attn=train_attn, train_unembed=train_unembed)
        config = {"seed": seed, "metadata": dict(user_metadata or {}), "dp_config": dp_config, **settings}
        return self.create_training_client(TrainingConfig(model_ref=base_model, lora_config=adapter, **config))

    async def create_lora_training_client_async(self, base_model: str, *args: Any, **kwargs: Any) -> TrainingClient:
        """Like ``create_lora_training_client``."""
        return await asyncio.to_thread(self.create_lora_training_client, base_model, *args, **kwargs)

    def create_training_client_from_state(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: Mapping[str, Any] | None = None,
        weights_access_token: str | None = None,
    ) -> TrainingClient:
        """Create a run from a checkpoint's weights, configured as the run that saved it; its optimizer is fresh.

        A private run's successor trains on the same dataset: what was spent stays spent.

        Args:
            path: or an artifact id.
            base_model: must be that of the checkpoint; a check only.
            weights_access_token: of other tenants' weights, which this server never hands out; refused.
        """
        return self._from_state(path, base_model, user_metadata, weights_access_token, optimizer=False)

    def create_training_client_from_state_with_optimizer(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: Mapping[str, Any] | None = None,
        weights_access_token: str | None = None,
    ) -> TrainingClient:
        """Like ``create_training_client_from_state``, and the optimizer goes on where it was saved."""
        return self._from_state(path, base_model, user_metadata, weights_access_token, optimizer=True)

    async def create_training_client_from_state_async(self, path: str, *args: Any, **kwargs: Any) -> TrainingClient:
        """Like ``create_training_client_from_state``."""
        return await asyncio.to_thread(self.create_training_client_from_state, path, *args, **kwargs)

    async def create_training_client_from_state_with_optimizer_async(
        self, path: str, *args: Any, **kwargs: Any
    ) -> TrainingClient:
        """Like ``create_training_client_from_state_with_optimizer``."""
        return await asyncio.to_thread(self.create_training_client_from_state_with_optimizer, path, *args, **kwargs)

    def create_sampling_client(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: RetryConfig | None = None,
    ) -> SamplingClient:
        """Sample from saved weights, or from a base model.

        Args:
            model_path: of ``save_weights_for_sampler`` or ``save_state``, or an artifact id.

        Raises:
            InvalidRequestError: not exactly one of model_path and base_model.
            ResourceNotFoundError: no such weights of this tenant, or no such model.
        """
        return SamplingClient.create(
            self._transport, model_path=model_path, base_model=base_model, retry_config=retry_config
        )

    async def create_sampling_client_async(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: RetryConfig | None = None,
    ) -> SamplingClient:
        """Like ``create_sampling_client``."""
        return await asyncio.to_thread(self.create_sampling_client, model_path, base_model, retry_config)

    def create_custom_loss(self, fn: Callable[..., Any], input_ranks: Mapping[str, int]) -> LossHandle:
        """Have the server keep a loss of one datum, which it runs itself: no code is sent, only what it calls.

        ``tc.forward_backward_custom(data, handle)`` uses it. Needs torch here, to trace the function.

        Args:
            fn: ``fn(logprobs, *inputs)`` to (scalar tensor, metrics named ``custom/<name>:sum`` or ``:mean``).
            input_ranks: of each parameter; see ``tg_tinker.custom.trace_loss``.

        Raises:
            InvalidRequestError: it cannot be traced, or calls what the server does not offer.
        """
        handle = trace_loss(fn, input_ranks)
        reply = self._transport.call(requests.create_custom_loss(handle.graph_json))
        return replace(handle, loss_id=reply.loss_id)

    def create_rest_client(self) -> RestClient:
        """Runs and checkpoints page by page, for those who manage them."""
        return RestClient(self._transport)

    async def get_server_capabilities_async(self) -> Capabilities:
        """Like ``get_server_capabilities``."""
        return await asyncio.to_thread(self.get_server_capabilities)

    def get_training_client(self, client_id: str) -> TrainingClient:
        """A handle on a run that exists, to go on where it stands. One handle drives a run at a time."""
        self._handshake()
        return self._client(self._run_info(client_id), takeover=True)

    def list_training_clients(self, status: str | None = None, limit: int = 100) -> list[TrainingClientInfo]:
        """The newest runs of the tenant; ``status`` is active, completed or failed."""
        reply = self._transport.call(requests.list_runs(status, limit))
        infos = [run_info_from_proto(run) for run in reply.runs]
        return [
            TrainingClientInfo(
                training_client_id=i.run_id,
                model_ref=i.config.model_ref,
                status=i.status,
                step=i.step,
                created=i.created,
                metadata=dict(i.config.metadata),
            )
            for i in infos
        ]

    def delete_training_client(self, training_client_id: str) -> None:
        """Delete a run and its results. Its checkpoints stay, and so does what it spent."""
        self._transport.call(requests.delete_run(training_client_id), attempt_s=self._config.timeout)

    def get_future(self, future_id: str) -> FutureHandle:
        """The handle of an operation, by its id, from any process.

        Raises:
            ResourceNotFoundError: there is none for this tenant.
        """
        state = future_from_proto(self._transport.call(get_future_request(future_id, wait_s=0.0)))
        if state.status == UNKNOWN:
            raise ResourceNotFoundError(f"no such future {future_id}", resource_type="future", resource_id=future_id)
        return FutureHandle(Elsewhere(self._transport).operation(state))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(wait_s=60.0 if error is None else 0.0)

    def _from_state(
        self,
        path: str,
        base_model: str | None,
        user_metadata: Mapping[str, Any] | None,
        weights_access_token: str | None,
        *,
        optimizer: bool,
    ) -> TrainingClient:
        if weights_access_token is not None:
            raise InvalidRequestError(
                "weights belong to their tenant; ask for an export (docs/how-to/share-a-model.md)",
                field="weights_access_token",
                constraint="None",
            )
        self._handshake()
        request = requests.create_run_like(
            uuid.uuid4().hex,
            path,
            optimizer=optimizer,
            base_model=base_model or "",
            metadata={**self._user_metadata, **(user_metadata or {})},
        )
        info = run_info_from_proto(self._transport.call(request, attempt_s=self._config.timeout))
        return self._client(info, takeover=False)

    def _run_info(self, run_id: str) -> RunInfo:
        request = requests.get_run(run_id)
        return run_info_from_proto(self._transport.call(request, attempt_s=self._config.timeout))

    def _client(self, info: RunInfo, *, takeover: bool) -> TrainingClient:
        assert self._guard is not None  # by the handshake
        with self._lock:
            session = self._sessions.get(info.run_id)
            if session is None or not session.usable or info.next_seq > session.next_seq:
                session = Session(self._transport, self._guard, info, takeover=takeover)
                self._sessions[info.run_id] = session
        return TrainingClient(self._transport, session, info)

"""Checkpoints of a run: saving, loading, weights for sampling, plain weights."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from tg_tinker._arguments import saving
from tg_tinker._training.base import RunHandle
from tg_tinker.sampling_client import RetryConfig, SamplingClient
from tg_tinker.types import AdapterWeights, LoadStateResult, SavedState, SaveStateResult
from tg_tinker.wire import federation
from tg_tinker.wire.calls import Load, Save

EPHEMERAL_S = 86_400
"""How long weights are kept that were saved for a sampling client alone."""


class Checkpoints(RunHandle):
    """What is saved is encrypted; what was spent stays spent."""

    def save_state(
        self,
        include_optimizer: bool | str = True,
        metadata: Mapping[str, Any] | int | None = None,
        *,
        name: str | None = None,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
    ) -> SaveStateResult:
        """Save an encrypted checkpoint of the run as it stands after every call made before.

        ``save_state("ck-1", 3600)`` names it and says how long it is kept.

        Args:
            include_optimizer: also save the optimizer's state. A text here is taken as ``name``.
            metadata: JSON-compatible; comes back with ``load_state``. A number here is taken as ``ttl_seconds``.
            name: 1 to 128 of ``A-Z a-z 0-9 . _ -``; unique in the run. ``path`` of the result ends with it.
            ttl_seconds: after which it is deleted; ``None``: never.
            overwrite: take the place of the checkpoint of this name; otherwise that is refused.

        Raises:
            InvalidRequestError: the name is taken (``field="name"``), or cannot be.
        """
        call = saving(include_optimizer, metadata, name, ttl_seconds=ttl_seconds, overwrite=overwrite)
        result: SaveStateResult = self._submit(call).result()
        return result

    def load_state(self, artifact_id: str, *, optimizer: bool | None = None) -> LoadStateResult:
        """Load a checkpoint: of an id everything that was saved, of a path (``tg://...``) the weights alone.

        What was spent stays spent.

        Args:
            optimizer: False leaves the optimizer fresh, True insists on it, whichever way it is named.
        """
        result: LoadStateResult = self._submit(Load(artifact_id=artifact_id, optimizer=optimizer)).result()
        return result

    def load_state_with_optimizer(self, path: str) -> LoadStateResult:
        """Load a checkpoint with its optimizer, by path or id.

        Raises:
            InvalidRequestError: it was saved without one.
        """
        return self.load_state(path, optimizer=True)

    def save_weights_for_sampler(self, name: str | None = None, ttl_seconds: int | None = None) -> SavedState:
        """Save the weights alone; ``path`` of the result is what ``create_sampling_client`` takes.

        Args:
            name: as in ``save_state``; names of states and of weights for sampling do not meet.
        """
        result: SavedState = self._submit(_for_sampling(name, ttl_seconds)).result()
        return result

    def save_weights_and_get_sampling_client(
        self, name: str | None = None, retry_config: RetryConfig | None = None
    ) -> SamplingClient:
        """A sampling client on the weights as they are now; later steps do not change it.

        The weights are kept for a day. To keep them, ``save_weights_for_sampler(name)``.
        """
        _warn_of_name(name)
        return self.create_sampling_client(self.save_weights_for_sampler(None, EPHEMERAL_S).path, retry_config)

    def create_sampling_client(self, model_path: str, retry_config: RetryConfig | None = None) -> SamplingClient:
        """A sampling client on a saved checkpoint, by path or id."""
        return SamplingClient.create(self._transport, model_path=model_path, retry_config=retry_config)

    def pull_weights(self) -> AdapterWeights:
        """The run's weights as they stand after every call made before, for averaging with others.

        Neither the optimizer nor gradients that wait for their step are part of them. The server notes it in the
        audit log.

        Raises:
            AuthorizationError: the key's roles do not allow exports.
            ServerError: what came was not whole; ask again.
        """
        self._session.await_weights()
        with closing(self._transport.stream(federation.pull_weights(self.id))) as chunks:
            return federation.weights_from_proto(chunks)

    # Twins for coroutines.

    async def save_state_async(
        self,
        include_optimizer: bool | str = True,
        metadata: Mapping[str, Any] | int | None = None,
        *,
        name: str | None = None,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
    ) -> SaveStateResult:
        """Like ``save_state``; the result may be awaited once more."""
        call = saving(include_optimizer, metadata, name, ttl_seconds=ttl_seconds, overwrite=overwrite)
        result: SaveStateResult = await self._submit(call)
        return result

    async def load_state_async(self, artifact_id: str, *, optimizer: bool | None = None) -> LoadStateResult:
        """Like ``load_state``; the result may be awaited once more."""
        result: LoadStateResult = await self._submit(Load(artifact_id=artifact_id, optimizer=optimizer))
        return result

    async def load_state_with_optimizer_async(self, path: str) -> LoadStateResult:
        """Like ``load_state_with_optimizer``; the result may be awaited once more."""
        return await self.load_state_async(path, optimizer=True)

    async def save_weights_for_sampler_async(
        self, name: str | None = None, ttl_seconds: int | None = None
    ) -> SavedState:
        """Like ``save_weights_for_sampler``; the result may be awaited once more."""
        result: SavedState = await self._submit(_for_sampling(name, ttl_seconds))
        return result

    async def save_weights_and_get_sampling_client_async(
        self, name: str | None = None, retry_config: RetryConfig | None = None
    ) -> SamplingClient:
        """Like ``save_weights_and_get_sampling_client``."""
        _warn_of_name(name)
        saved = await self.save_weights_for_sampler_async(None, EPHEMERAL_S)
        return await self.create_sampling_client_async(saved.path, retry_config)

    async def create_sampling_client_async(
        self, model_path: str, retry_config: RetryConfig | None = None
    ) -> SamplingClient:
        """Like ``create_sampling_client``."""
        return await asyncio.to_thread(self.create_sampling_client, model_path, retry_config)


def _for_sampling(name: str | None, ttl_seconds: int | None) -> Save:
    return Save(include_optimizer=False, kind="sampler", name=name or "", ttl_seconds=ttl_seconds)


def _warn_of_name(name: str | None) -> None:
    if name is not None:
        warnings.warn(
            "name has no effect here; save_weights_for_sampler(name) keeps weights under a name",
            DeprecationWarning,
            stacklevel=3,
        )

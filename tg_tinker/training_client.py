"""TrainingClient: trains, samples and checkpoints one run on the server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from tg_tinker._arguments import generation, keyed_units, sampling_params, saving, texts, updates
from tg_tinker._transport import Transport
from tg_tinker.datasets import Dataset
from tg_tinker.errors import InvalidRequestError
from tg_tinker.futures import FutureHandle
from tg_tinker.privacy_view import PrivacyView
from tg_tinker.session import Session
from tg_tinker.types import (
    AdapterWeights,
    BatchData,
    LoadStateResult,
    SampleResult,
    SaveStateResult,
    StreamChunk,
    TrainingConfig,
)
from tg_tinker.types.run import RunInfo
from tg_tinker.wire import federation, requests
from tg_tinker.wire.calls import Call, Load, Pass, Step
from tg_tinker.wire.results import chunk_from_proto
from tg_tinker.wire.runs import run_info_from_proto

Batch = BatchData | Mapping[str, Any]


class TrainingClient:
    """One run. Made by ``ServiceClient``; threads may share it.

    Calls are executed in the order they were made. ``forward_backward`` and ``optim_step`` return at once
    with a FutureHandle; ``sample``, ``save_state`` and ``load_state`` wait for their result.
    """

    def __init__(self, transport: Transport, session: Session, info: RunInfo) -> None:
        self._transport = transport
        self._session = session
        self._config = info.config
        self._unit_key = info.unit_key
        self._training = True

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

    # Training.

    def forward_backward(
        self,
        batch: Batch | None = None,
        batch_hash: str | None = None,
        *,
        privacy_unit_ids: Sequence[str] | None = None,
        dataset: Dataset | str | None = None,
    ) -> FutureHandle:
        """Execute a forward and backward pass; gradients add up until ``optim_step``.

        Args:
            batch: input_ids, and optionally attention_mask and labels (-100 is ignored), as BatchData or dict.
            batch_hash: ``"sha256:..."`` from ``hash_batch`` must match the batch that arrives; any other text is
                a label for the audit log.
            privacy_unit_ids: whose each record is, for privacy units larger than a record. Only keyed hashes of
                them leave this process.
            dataset: instead of a batch: a registered dataset, or its id, from which the server draws one. A step
                takes one draw, and nobody learns which records were in it.

        Returns:
            Resolves to a ForwardBackwardResult. In eval mode the loss is computed and nothing adds up.

        Raises:
            InvalidRequestError: shapes, keys or units that cannot be, before anything is sent.
        """
        if dataset is not None:
            return self._submit(self._drawn_pass(dataset, batch, batch_hash, privacy_unit_ids))
        if batch is None:
            raise InvalidRequestError(
                "forward_backward needs a batch, or dataset=...", field="batch", constraint="a batch or a dataset"
            )
        data = BatchData.of(batch)
        units = None if privacy_unit_ids is None else keyed_units(self._unit_key, privacy_unit_ids, data.num_records)
        return self._submit(Pass(batch=data, train=self._training, units=units, batch_hash=batch_hash))

    def add_updates(self, vectors: npt.NDArray[np.float32], privacy_unit_ids: Sequence[str]) -> FutureHandle:
        """Add rows that were computed elsewhere; like the gradients of a pass they add up until ``optim_step``.

        For runs with ``model_ref="vector:<P>"``. Under differential privacy the server sums the rows of each unit and
        clips the sum to ``max_grad_norm``; one that is not finite contributes zero. A step moves the run's vector
        against the (noised) sum, divided by the expected batch size, as it does with any gradient.

        Args:
            vectors: float32 [rows, P].
            privacy_unit_ids: whose each row is. Only keyed hashes of them leave this process.

        Returns:
            Resolves to a ForwardBackwardResult whose loss is zero.

        Raises:
            InvalidRequestError: rows or units that cannot be, before anything is sent; or eval mode.
        """
        if not self._training:
            raise InvalidRequestError(
                "add_updates in eval mode; call train() first", field="add_updates", constraint="train mode"
            )
        return self._submit(updates(self._unit_key, vectors, privacy_unit_ids))

    def optim_step(self, apply_dp_noise: bool = True) -> FutureHandle:
        """Apply the gradients that added up.

        Args:
            apply_dp_noise: False is refused under differential privacy, unless the run was created for it.

        Returns:
            Resolves to an OptimStepResult.

        Raises:
            InvalidRequestError: the client is in eval mode.
        """
        if not self._training:
            raise InvalidRequestError(
                "optim_step in eval mode; call train() first", field="optim_step", constraint="train mode"
            )
        return self._submit(Step(apply_dp_noise=bool(apply_dp_noise)))

    def train(self) -> None:
        """Set training mode: passes add up gradients, dropout is on."""
        self._training = True

    def eval(self) -> None:
        """Set evaluation mode: passes compute the loss only. Gradients that added up stay."""
        self._training = False

    # Sampling.

    def sample(
        self,
        prompts: str | Sequence[str],
        max_tokens: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        stop_sequences: Sequence[str] | None = None,
        num_completions: int = 1,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        *,
        seed: int | None = None,
    ) -> SampleResult:
        """Generate ``num_completions`` texts for each prompt, after every call made before.

        Args:
            temperature: 0 is greedy.
            stop_sequences: texts that end a completion; they are not part of it.
            seed: makes the choices repeatable.

        Raises:
            InvalidRequestError: naming the option that is out of range.
        """
        call = generation(
            prompts,
            num_completions,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            stop_sequences=texts(stop_sequences),
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            seed=seed,
        )
        result: SampleResult = self._submit(call).result()
        return result

    def sample_stream(
        self, prompts: str, max_tokens: int = 128, temperature: float = 1.0, **kwargs: Any
    ) -> Iterator[StreamChunk]:
        """Stream one completion as it is generated, from the weights of the last step that has ended.

        Args:
            prompts: one prompt; lists are refused.
            kwargs: the other options of ``sample``, except num_completions.

        Raises:
            InvalidRequestError: a list of prompts, or an option that is unknown or out of range.
        """
        if not isinstance(prompts, str):
            raise InvalidRequestError(
                f"sample_stream takes one prompt, not a {type(prompts).__name__}; use sample() for several",
                field="prompts",
                constraint="one string",
            )
        if kwargs.pop("num_completions", 1) != 1:
            raise InvalidRequestError(
                "sample_stream streams one completion; use sample() for several",
                field="num_completions",
                constraint="1",
            )
        options = {"max_tokens": max_tokens, "temperature": temperature, **kwargs}
        options["stop_sequences"] = texts(kwargs.get("stop_sequences"))
        request = requests.sample_stream(self.id, prompts, sampling_params(options))
        return map(chunk_from_proto, self._transport.stream(request))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, by the run's tokenizer."""
        return self.encode_batch([text])[0]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, by the run's tokenizer."""
        return self.decode_batch([ids])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many texts in one round trip."""
        reply = self._transport.call(requests.encode_texts(self.id, list(texts)))
        return [list(tokens.ids) for tokens in reply.ids]

    def decode_batch(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Texts of many token lists in one round trip."""
        reply = self._transport.call(requests.decode_ids(self.id, [[int(i) for i in one] for one in ids]))
        return list(reply.texts)

    # Checkpoints.

    def save_state(
        self,
        include_optimizer: bool | str = True,
        metadata: Mapping[str, Any] | None = None,
        *,
        name: str | None = None,
    ) -> SaveStateResult:
        """Save an encrypted checkpoint of the run as it stands after every call made before.

        Args:
            include_optimizer: also save the optimizer's state. A text here is taken as ``name``.
            metadata: JSON-compatible; comes back with ``load_state``.
            name: for people; any text.
        """
        result: SaveStateResult = self._submit(saving(include_optimizer, metadata, name)).result()
        return result

    def load_state(self, artifact_id: str, *, optimizer: bool | None = None) -> LoadStateResult:
        """Load a checkpoint: weights, step, and the optimizer if it was saved. What was spent stays spent.

        Args:
            optimizer: ``None`` loads what was saved, False leaves the optimizer fresh, True insists on it.
        """
        result: LoadStateResult = self._submit(Load(artifact_id=artifact_id, optimizer=optimizer)).result()
        return result

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

    # The run itself.

    def get_info(self) -> RunInfo:
        """The run as the server sees it now: step, status, budget, sizes."""
        return self._saw(self._transport.call(requests.get_run(self.id)))

    def unload_model(self) -> RunInfo:
        """Free the run's memory on the server and complete it; its checkpoints stay."""
        return run_info_from_proto(self._transport.call(requests.unload_run(self.id)))

    def close(self, *, wait_s: float = 60.0) -> None:
        """Take no more calls. Calls already made are handed to the server first, for up to ``wait_s`` seconds."""
        self._session.close(wait_s=wait_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(wait_s=60.0 if error is None else 0.0)

    def __repr__(self) -> str:
        return f"<TrainingClient {self.id} {self._config.model_ref}>"

    # Twins for coroutines: they make the call at once and never block the event loop.

    async def forward_backward_async(
        self,
        batch: Batch | None = None,
        batch_hash: str | None = None,
        *,
        privacy_unit_ids: Sequence[str] | None = None,
        dataset: Dataset | str | None = None,
    ) -> FutureHandle:
        """Like ``forward_backward``; await the returned handle for the result."""
        return self.forward_backward(batch, batch_hash, privacy_unit_ids=privacy_unit_ids, dataset=dataset)

    async def optim_step_async(self, apply_dp_noise: bool = True) -> FutureHandle:
        """Like ``optim_step``; await the returned handle for the result."""
        return self.optim_step(apply_dp_noise)

    async def sample_async(
        self,
        prompts: str | Sequence[str],
        max_tokens: int = 128,
        temperature: float = 1.0,
        num_completions: int = 1,
        **kwargs: Any,
    ) -> SampleResult:
        """Like ``sample``, with its other options as keywords."""
        options = {"max_tokens": max_tokens, "temperature": temperature, **kwargs}
        options["stop_sequences"] = texts(kwargs.get("stop_sequences"))
        result: SampleResult = await self._submit(generation(prompts, num_completions, **options))
        return result

    async def save_state_async(
        self,
        include_optimizer: bool | str = True,
        metadata: Mapping[str, Any] | None = None,
        *,
        name: str | None = None,
    ) -> SaveStateResult:
        """Like ``save_state``."""
        result: SaveStateResult = await self._submit(saving(include_optimizer, metadata, name))
        return result

    async def load_state_async(self, artifact_id: str, *, optimizer: bool | None = None) -> LoadStateResult:
        """Like ``load_state``."""
        result: LoadStateResult = await self._submit(Load(artifact_id=artifact_id, optimizer=optimizer))
        return result

    async def get_info_async(self) -> RunInfo:
        """Like ``get_info``."""
        return self._saw(await asyncio.wrap_future(self._transport.send(requests.get_run(self.id))))

    def _drawn_pass(self, dataset: Dataset | str, *given: object) -> Pass:
        if any(value is not None for value in given):
            raise InvalidRequestError(
                "the server draws the batch itself; give a batch or a dataset, not both",
                field="dataset",
                constraint="a batch or a dataset",
            )
        if not self._training:
            raise InvalidRequestError(
                "a registered dataset is drawn from for training only; call train() first, or evaluate on a batch",
                field="dataset",
                constraint="train mode",
            )
        dataset_id = dataset.id if isinstance(dataset, Dataset) else dataset
        if not isinstance(dataset_id, str) or not dataset_id:
            raise InvalidRequestError(
                "dataset must be a Dataset or the id of one", field="dataset", constraint="a registered dataset"
            )
        return Pass.drawn_from(dataset_id)

    def _submit(self, call: Call) -> FutureHandle:
        return FutureHandle(self._session.submit(call))

    def _saw(self, reply: Any) -> RunInfo:
        info = run_info_from_proto(reply)
        self._session.saw_run(info)
        return info

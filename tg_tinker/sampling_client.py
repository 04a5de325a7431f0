"""SamplingClient: token ids in, token ids and log-probabilities out, from frozen weights."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from tg_tinker import texts
from tg_tinker._endpoint import read_tls_files
from tg_tinker._transport import Transport
from tg_tinker.errors import (
    FutureCancelledError,
    FutureTimeoutError,
    InvalidRequestError,
    RateLimitedError,
    ServerError,
)
from tg_tinker.types import ServiceConfig
from tg_tinker.types.datum import ModelInput
from tg_tinker.types.tokens import (
    SampledTokens,
    SampleEvent,
    SampleQuery,
    SampleResponse,
    SamplingParams,
    response_of,
)
from tg_tinker.wire import requests, tokens

Prompt = ModelInput | Sequence[int]
T = TypeVar("T")
_MOST_AT_ONCE = 256  # threads that wait for samples; more requests wait here for their turn
_lock = threading.Lock()
_transports: dict[ServiceConfig, Transport] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryConfig:
    """When a request for samples is sent again: samples cost nothing but time, so that is always safe.

    Attributes:
        enable_retry_logic: otherwise every refusal for want of room and every broken connection is an error at once.
        max_wait_s: seconds to keep trying.
    """

    enable_retry_logic: bool = True
    max_wait_s: float = 600.0


class SampleFuture(Generic[T]):
    """A result under way: ``result()`` waits for it, and so does ``await``."""

    def __init__(self, future: Future[T], given_up: threading.Event) -> None:
        self._future, self._given_up = future, given_up

    def result(self, timeout: float | None = None) -> T:
        """Wait for the result.

        Raises:
            FutureTimeoutError: it has not come within ``timeout`` seconds; ask again.
            TGTinkerError: what went wrong.
        """
        try:
            return self._future.result(timeout)
        except FutureTimeout as e:
            if self._future.done():
                raise
            raise FutureTimeoutError(f"no samples within {timeout} s; they may still come", timeout=timeout) from e

    async def result_async(self, timeout: float | None = None) -> T:
        """The same for a coroutine. Cancelling the wait cancels the request."""
        try:
            return await asyncio.wait_for(asyncio.wrap_future(self._future), timeout)
        except asyncio.CancelledError:
            self.cancel()
            raise
        except TimeoutError as e:
            self.cancel()
            raise FutureTimeoutError(f"no samples within {timeout} s; given up", timeout=timeout) from e

    def __await__(self) -> Generator[Any, None, T]:
        return self.result_async().__await__()

    def done(self) -> bool:
        """Whether it has ended."""
        return self._future.done()

    def cancel(self) -> bool:
        """Give it up; the server stops with the next token. Says whether it had not ended yet."""
        self._given_up.set()
        return self._future.cancel() or not self._future.done()


class SamplingClient:
    """Samples from a base model or from saved weights, which never change. Threads may share it.

    It may be pickled and used in another process. A pickle holds the API key: treat it like one.
    """

    def __init__(
        self, transport: Transport, info: tokens.SamplerInfo, retry_config: RetryConfig | None = None
    ) -> None:
        self._transport, self._info, self._retry = transport, info, retry_config or RetryConfig()
        self._pool = ThreadPoolExecutor(_MOST_AT_ONCE, thread_name_prefix="tg-tinker-sample")

    @classmethod
    def create(
        cls,
        transport: Transport,
        *,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: RetryConfig | None = None,
    ) -> SamplingClient:
        """Have the server name frozen weights.

        Raises:
            InvalidRequestError: not exactly one of model_path and base_model.
            ResourceNotFoundError: there is no such checkpoint of this tenant.
        """
        if (not model_path) == (not base_model):
            raise InvalidRequestError(
                "a sampling client needs model_path (of saved weights) or base_model, and not both",
                field="model_path",
                constraint="one of model_path and base_model",
            )
        request = requests.create_sampler(uuid.uuid4().hex, base_model=base_model or "", path=model_path or "")
        return cls(transport, tokens.sampler_from_proto(transport.call(request)), retry_config)

    @property
    def id(self) -> str:
        """The server's name of the frozen weights."""
        return self._info.sampler_id

    @property
    def model_path(self) -> str:
        """Path of the weights; empty for a base model."""
        return self._info.path

    def get_base_model(self) -> str:
        """The base model, or the one that the adapter is for."""
        return self._info.base_model

    async def get_base_model_async(self) -> str:
        """Like ``get_base_model``."""
        return self.get_base_model()

    def sample(
        self,
        prompt: Prompt,
        num_samples: int = 1,
        sampling_params: SamplingParams | None = None,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        **kwargs: Any,
    ) -> SampleFuture[SampleResponse]:
        """Sample ``num_samples`` sequences.

        Args:
            prompt: token ids; ``encode`` makes them of a text.
            include_prompt_logprobs: also those of the prompt's tokens, the first ``None``.
            topk_prompt_logprobs: that many most likely tokens at each position of the prompt.
            kwargs: topk_sample_logprobs, target_prompt_logprobs, prompt_alt_tokens_k and prompt_logprobs_last_n of
                ``tg_tinker.types.tokens.SampleQuery``.

        Returns:
            Resolves to a SampleResponse.

        Raises:
            InvalidRequestError: naming what is out of range, before anything is sent.
        """
        query = _query(
            prompt,
            num_samples=num_samples,
            params=sampling_params or SamplingParams(),
            prompt_logprobs=include_prompt_logprobs,
            topk_prompt_logprobs=topk_prompt_logprobs,
            **kwargs,
        )
        return self._start(query, lambda response: response)

    async def sample_async(
        self,
        prompt: Prompt,
        num_samples: int = 1,
        sampling_params: SamplingParams | None = None,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        **kwargs: Any,
    ) -> SampleResponse:
        """Like ``sample``; cancelling it cancels the request."""
        return await self.sample(
            prompt, num_samples, sampling_params, include_prompt_logprobs, topk_prompt_logprobs, **kwargs
        )

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[SampledTokens]:
        """One sequence as it is sampled. Closing the iterator cancels the request.

        Raises:
            RateLimitedError: too many wait already; nothing was begun.
        """
        query = _query(prompt, params=sampling_params or SamplingParams())
        for event in self._events(query):
            if isinstance(event, SampledTokens):
                yield event

    def compute_logprobs(self, prompt: Prompt) -> SampleFuture[list[float | None]]:
        """Log-probability of each token of a prompt given those before it, in nats; the first is ``None``."""
        query = _query(prompt, params=SamplingParams(max_tokens=1), prompt_logprobs=True)
        return self._start(query, lambda response: response.prompt_logprobs or [])

    async def compute_logprobs_async(self, prompt: Prompt) -> list[float | None]:
        """Like ``compute_logprobs``."""
        return await self.compute_logprobs(prompt)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, by the model's tokenizer; no chat template."""
        return texts.encode(self._transport, text, sampler_id=self.id)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        return texts.decode(self._transport, ids, sampler_id=self.id)

    def get_tokenizer(self) -> Any:
        """The model's tokenizer; see ``TrainingClient.get_tokenizer``."""
        return texts.tokenizer(self._transport, self._info.base_model, sampler_id=self.id)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self._transport.config, self._info, self._retry)

    def __repr__(self) -> str:
        return f"<SamplingClient {self._info.path or self._info.base_model}>"

    def _start(self, query: SampleQuery, finish: Callable[[SampleResponse], T]) -> SampleFuture[T]:
        given_up = threading.Event()
        return SampleFuture(self._pool.submit(lambda: finish(self._whole(query, given_up))), given_up)

    def _whole(self, query: SampleQuery, given_up: threading.Event) -> SampleResponse:
        deadline = time.monotonic() + self._retry.max_wait_s
        while True:
            try:
                events: list[SampleEvent] = []
                with closing(self._events(query)) as stream:
                    for event in stream:
                        if given_up.is_set():
                            raise FutureCancelledError("the request was cancelled")
                        events.append(event)
                return response_of(events)
            except ValueError as e:
                raise ServerError("the samples ended before the request did; ask again") from e
            except (RateLimitedError, ServerError) as e:
                pause = e.retry_after if isinstance(e, RateLimitedError) else 1.0
                again = isinstance(e, RateLimitedError) or e.details.get("retry") is True
                late = time.monotonic() + pause > deadline
                if not again or late or not self._retry.enable_retry_logic or given_up.wait(pause):
                    raise

    def _events(self, query: SampleQuery) -> Generator[SampleEvent]:
        with closing(self._transport.stream(tokens.query_to_proto(query, sampler_id=self.id))) as replies:
            for reply in replies:
                yield from tokens.events_from_proto(reply)


def _query(prompt: Prompt, **options: Any) -> SampleQuery:
    if isinstance(prompt, str | bytes):
        raise InvalidRequestError(
            "prompt is a text; a SamplingClient takes token ids: ModelInput.from_ints(client.encode(text))",
            field="prompt",
            constraint="a ModelInput, or token ids",
        )
    ids = prompt.to_ints() if isinstance(prompt, ModelInput) else prompt
    targets = options.get("target_prompt_logprobs")
    if targets is not None:
        options["target_prompt_logprobs"] = np.asarray(
            getattr(targets, "to_numpy", lambda: targets)(), dtype=np.int64
        )
    try:
        return SampleQuery(prompt=tuple(int(i) for i in ids), **options)
    except TypeError as e:
        raise InvalidRequestError(f"sample: {e}", field="sample", constraint="the options of sample()") from e


def _restored(config: ServiceConfig, info: tokens.SamplerInfo, retry: RetryConfig) -> SamplingClient:
    """In another process: one connection for all clients of one server."""
    with _lock:
        transport = _transports.get(config)
        if transport is None or transport.closed:
            transport = _transports[config] = Transport(config, tls=read_tls_files() if config.tls else None)
    return SamplingClient(transport, info, retry)

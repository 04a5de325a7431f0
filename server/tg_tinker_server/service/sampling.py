"""Text from a run's released weights: whole completions in the lane, or a stream beside it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import Sample, SampleResult, StreamChunk
from tg_tinker.types.sampling import GenerationOptions
from tg_tinker.wire.calls import Generate
from tg_tinker_server.engine.backend import TokenEvent
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.service.lanes import Operation
from tg_tinker_server.service.run import Run

SLICE_TOKENS = 8  # new tokens per turn on the compute thread; reading the prompts takes turns of its own
MAX_COMPLETIONS = 512


def check(request: Generate) -> None:
    """Refuse what no server should try.

    Raises:
        InvalidRequestError: naming the argument.
    """
    count = len(request.prompts) * request.num_completions
    rules = (
        ("prompts", len(request.prompts) >= 1, "at least one prompt"),
        ("num_completions", request.num_completions >= 1, "at least 1"),
        ("num_completions", count <= MAX_COMPLETIONS, f"prompts x completions at most {MAX_COMPLETIONS}"),
    )
    for name, holds, constraint in rules:
        if not holds:
            raise InvalidRequestError(f"{name} must be: {constraint}", field=name, constraint=constraint)


@dataclass(slots=True)
class _Progress:
    """One completion as it grows."""

    prompt: str
    text: str = ""
    num_tokens: int = 0
    finish_reason: str = "length"
    latency_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class SamplingService:
    """Generation in slices, so that many runs share the compute thread."""

    executors: Executors

    async def sample(self, run: Run, operation: Operation, request: Generate) -> SampleResult:
        """Complete every prompt ``num_completions`` times; prompt-major order."""
        check(request)
        started = time.perf_counter()
        grown = [_Progress(p) for p in request.prompts for _ in range(request.num_completions)]
        async for events in self._slices(run, [g.prompt for g in grown], request.params, SLICE_TOKENS):
            for event in events:
                progress = grown[event.index]
                progress.text += event.text
                progress.num_tokens += len(event.token_ids)
                if event.finish_reason:
                    progress.finish_reason = event.finish_reason
                    progress.latency_ms = (time.perf_counter() - started) * 1e3
        return SampleResult(
            samples=[
                Sample(
                    prompt=g.prompt,
                    completion=g.text,
                    num_tokens=g.num_tokens,
                    finish_reason=g.finish_reason,
                    latency_ms=g.latency_ms,
                )
                for g in grown
            ],
            total_tokens=sum(g.num_tokens for g in grown),
            latency_ms=operation.elapsed_ms(),
        )

    async def stream(self, run: Run, request: Generate) -> AsyncIterator[StreamChunk]:
        """Yield text as it is generated; never half a character, never part of a stop sequence."""
        async for events in self._slices(run, list(request.prompts), request.params, 1):
            for event in events:
                yield StreamChunk(
                    text=event.text,
                    index=event.index,
                    token_ids=list(event.token_ids),
                    finish_reason=event.finish_reason,
                )

    async def encode(self, run: Run, texts: list[str]) -> list[list[int]]:
        """Texts to token ids."""
        return await self.executors.compute(lambda: [run.session.encode(t) for t in texts])

    async def decode(self, run: Run, ids: list[list[int]]) -> list[str]:
        """Token ids to texts."""
        outside = [i for row in ids for i in row if not 0 <= i < run.session.vocab_size]
        if outside:
            raise InvalidRequestError(
                f"a token id is outside 0 to {run.session.vocab_size - 1}",
                field="ids",
                constraint=f"0 <= id < {run.session.vocab_size}",
            )
        return await self.executors.compute(lambda: [run.session.decode(row) for row in ids])

    async def _slices(
        self, run: Run, prompts: list[str], params: GenerationOptions, slice_tokens: int
    ) -> AsyncIterator[list[TokenEvent]]:
        run.require_intact()
        ids = await self.encode(run, prompts)
        turns = run.session.generate(ids, params, slice_tokens=slice_tokens)
        try:
            while True:
                async with run.weights:  # never weights that are not settled
                    events = await self.executors.compute(_next, turns)
                if events is None:
                    return
                yield events
        finally:
            await self.executors.compute(_close, turns)


def _next(turns: Iterator[list[TokenEvent]]) -> list[TokenEvent] | None:
    return next(turns, None)


def _close(turns: Iterator[list[TokenEvent]]) -> None:
    close = getattr(turns, "close", None)
    if close is not None:
        close()

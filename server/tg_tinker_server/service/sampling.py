"""Text from a run's released weights: whole completions in the lane, or a stream beside it.

Both are requests of the loop that serves samplers too.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import Sample, SampleResult, StreamChunk
from tg_tinker.types.sampling import GenerationOptions
from tg_tinker.wire.calls import Generate
from tg_tinker_server.config import SharePasses
from tg_tinker_server.engine.sampling.text_query import SampledText, TextQuery, text_queries
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.service.lanes import Operation
from tg_tinker_server.service.passes import sharing_group
from tg_tinker_server.service.run import Run
from tg_tinker_server.service.sampling_loop import SamplingLoop

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
    """Completions of a run's own prompts. Runs that may share passes share batches too."""

    executors: Executors
    loop: SamplingLoop
    share: SharePasses

    async def sample(self, run: Run, operation: Operation, request: Generate) -> SampleResult:
        """Complete every prompt ``num_completions`` times; prompt-major order."""
        check(request)
        started = time.perf_counter()
        grown = [_Progress(p) for p in request.prompts for _ in range(request.num_completions)]
        slices = self._slices(run, request.prompts, request.params, completions=request.num_completions)
        async with aclosing(slices) as news:
            async for events in news:
                for event in events:
                    progress = grown[event.index]
                    progress.text += event.text
                    progress.num_tokens += len(event.tokens)
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

    async def stream(self, run: Run, request: Generate) -> AsyncGenerator[StreamChunk]:
        """Yield text as it is generated; never half a character, never part of a stop sequence.

        The run may train meanwhile: each token comes from the weights that were settled when it was chosen. Closing
        the generator frees its row of the batch.
        """
        async with aclosing(self._slices(run, request.prompts, request.params, completions=1)) as news:
            async for events in news:
                for event in events:
                    yield StreamChunk(
                        text=event.text,
                        index=event.index,
                        token_ids=list(event.tokens),
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
        self, run: Run, prompts: Sequence[str], params: GenerationOptions, *, completions: int
    ) -> AsyncGenerator[list[SampledText]]:
        run.require_intact()
        queries = await self.executors.compute(_queries, run, prompts, params, completions)
        weights = run.session.live_weights()
        group = sharing_group(run, self.share) or object()  # the prompts of one request share in any case
        slices = self.loop.slices(weights, queries, group, unsettled=run.weights)
        async with aclosing(slices) as news:
            async for events in news:
                run.require_intact()  # a step may have failed half-way since
                if texts := [event for event in events if isinstance(event, SampledText)]:
                    yield texts


def _queries(run: Run, prompts: Sequence[str], params: GenerationOptions, completions: int) -> list[TextQuery]:
    """On the compute thread: many long prompts take a while."""
    ids = [run.session.encode(prompt) for prompt in prompts]
    return text_queries(run.session.live_weights(), ids, params, completions=completions)

"""Perplexity and samples of a model, asked of it through the public client."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tg_tinker import TrainingClient
from tg_tinker.data import collate
from tg_tinker_server.demo.settings import DemoSettings
from tg_tinker_server.demo.state import Measured

BOUNDARY = "<|endoftext|>"  # begins and ends every record: the model learns where a diagnosis stops


def encode_records(tc: TrainingClient, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, between two boundary tokens."""
    return tc.encode_batch([BOUNDARY + text + BOUNDARY for text in texts])


def micro_batches(records: Sequence[list[int]], *, size: int) -> list[list[list[int]]]:
    """Records in groups of at most ``size``, like lengths together, so that little is padding."""
    ordered = sorted(records, key=len)
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def perplexity(tc: TrainingClient, texts: Sequence[str], *, batch_size: int) -> float:
    """exp of the mean negative log-likelihood per token over ``texts``. Leaves the client in train mode."""
    tc.eval()
    try:
        batches = micro_batches(encode_records(tc, texts), size=batch_size)
        results = [future.result() for future in [tc.forward_backward(collate(batch)) for batch in batches]]
    finally:
        tc.train()
    nats = sum(result.metrics["loss:sum"] for result in results)
    tokens = sum(len(record) - 1 for batch in batches for record in batch)
    return math.exp(nats / tokens)


def measure(tc: TrainingClient, held_out: Sequence[str], settings: DemoSettings) -> Measured:
    """Perplexity on public texts, and one completion for each of the demo's prompts."""
    result = tc.sample(
        [BOUNDARY + prompt for prompt in settings.prompts],
        max_tokens=settings.max_sample_tokens,
        temperature=settings.temperature,
    )
    return Measured(
        perplexity=perplexity(tc, held_out, batch_size=settings.micro_batch_size),
        samples=tuple(one_line(sample.completion) for sample in result.samples),
    )


def one_line(text: str) -> str:
    """A completion as it is shown: without boundary tokens and line breaks."""
    return " ".join(text.replace(BOUNDARY, " ").split())

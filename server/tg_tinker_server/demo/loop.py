"""The private training loop: draw a Poisson batch, send it, take a noised step, until the plan or the budget ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from tg_tinker import TrainingClient
from tg_tinker.data import PoissonSampler, collate
from tg_tinker.errors import DPBudgetExceededError
from tg_tinker_server.demo.measure import encode_records, micro_batches
from tg_tinker_server.demo.settings import DemoSettings
from tg_tinker_server.demo.state import StepPoint


def train(
    tc: TrainingClient, texts: Sequence[str], settings: DemoSettings, *, on_step: Callable[[StepPoint], None]
) -> bool:
    """Take steps from where the client stands to ``settings.steps``; ``on_step`` hears of each.

    Every record takes part in a step independently with the probability the configuration declares.

    Returns:
        False if the budget ended before the plan: a step that was paid for and interrupted stays paid.
    """
    sampler = PoissonSampler.from_config(tc.config)

    def next_batches() -> list[list[list[int]]]:
        drawn = [texts[i] for i in sampler.draw()]
        records = encode_records(tc, drawn)
        return micro_batches(records, size=settings.micro_batch_size) or [[]]  # an empty draw is a step too

    batches = next_batches()
    while tc.step < settings.steps:
        started = time.monotonic()
        passes = [tc.forward_backward(collate(batch)) for batch in batches]
        step = tc.optim_step()
        sizes = [len(batch) for batch in batches]
        batches = next_batches()  # drawn and encoded while the server computes
        try:
            results = [future.result() for future in passes]
            outcome = step.result()
        except DPBudgetExceededError:
            return False
        assert outcome.dp_metrics is not None
        records = sum(sizes)
        on_step(
            StepPoint(
                step=outcome.step,
                loss=sum(r.loss * n for r, n in zip(results, sizes, strict=True)) / max(records, 1),
                epsilon=outcome.dp_metrics.total_epsilon,
                tokens=sum(r.num_tokens for r in results),
                seconds=time.monotonic() - started,
            )
        )
    return True

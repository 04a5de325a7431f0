"""Tokens per second of `sample` against plain `generate` of transformers on the same adapter in process."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import peft
import torch

from benchmarks.engine_peers.shapes import build_model
from benchmarks.report import paired_ratio, round_orders
from benchmarks.service_parts.server import ServerProcess
from benchmarks.service_parts.topic import Topic
from benchmarks.service_parts.workload import BUNDLED, private_config

PROMPT = "The patient was seen for"
COMPLETIONS = (1, 8, 32)
TOKENS = 64


class PlainGenerate:
    """The bundled model with a PEFT adapter of the same shape, and `generate` as people call it."""

    def __init__(self, prompt_ids: list[int]) -> None:
        base = build_model(BUNDLED)
        config = peft.LoraConfig(
            r=BUNDLED.rank, lora_alpha=2 * BUNDLED.rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        self._model: Any = peft.get_peft_model(base, config).eval()
        self._ids = torch.tensor([prompt_ids])
        self._eos = base.generation_config.eos_token_id

    def sample(self, completions: int) -> int:
        """Generate, and count the tokens before each completion's end."""
        rows = self._model.generate(
            input_ids=self._ids,
            attention_mask=torch.ones_like(self._ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=TOKENS,
            num_return_sequences=completions,
            pad_token_id=self._eos,
        )
        return sum(tokens_before_end(row, self._eos) for row in rows[:, self._ids.shape[1] :].tolist())


def tokens_before_end(row: list[int], eos: int) -> int:
    """How many tokens a completion has.

    >>> tokens_before_end([5, 6, 0, 0], eos=0)
    2
    """
    return row.index(eos) if eos in row else len(row)


def sampling(folder: Path, *, quick: bool) -> Topic:
    """1, 8 and 32 completions of one prompt, 64 tokens each, temperature 1."""
    rounds = 2 if quick else 9
    names = [f"{who} {n}" for n in COMPLETIONS for who in ("service", "generate")]
    rates: dict[str, list[float]] = {name: [] for name in names}
    with ServerProcess(folder) as server, server.client() as service:
        client = service.create_training_client(private_config(BUNDLED))
        plain = PlainGenerate(client.encode(PROMPT))
        take = {
            "service": lambda n: client.sample(PROMPT, max_tokens=TOKENS, num_completions=n).total_tokens,
            "generate": plain.sample,
        }
        for work in take.values():
            work(2)
        for order in round_orders(names, rounds=rounds):
            for name in order:
                who, count = name.split()
                began_s = time.perf_counter()
                tokens = take[who](int(count))
                rates[name].append(tokens / (time.perf_counter() - began_s))
    rows: list[tuple[object, ...]] = []
    for n in COMPLETIONS:
        ours, plain_rates = rates[f"service {n}"], rates[f"generate {n}"]
        ratio = paired_ratio(ours, plain_rates)
        medians = (statistics.median(ours), statistics.median(plain_rates))
        completions = f"{n} completion{'s' if n > 1 else ''}"
        rows.append((completions, *(f"{m:,.0f}" for m in medians), ratio, f"{ratio.low:.2f} to {ratio.high:.2f}"))
    return Topic(
        title=f"Sampling from {BUNDLED.model} with an adapter: {TOKENS} tokens, temperature 1",
        columns=("", "sample tokens/s", "generate tokens/s", "ratio", "quartiles"),
        rows=rows,
        notes=f"By the clock, gRPC and text included on our side; above 1 we are faster. {rounds} rounds.",
        figures={"tokens_per_s": rates},
    )

"""Tokens per second of many clients that sample at once, against ``generate`` of transformers one request at a time.

``python -m benchmarks.sampling`` measures the engine in process, without gRPC. Clients have adapters of four runs on
one base model; each sends requests one after the other. A prompt is its own, or begins like all others. CPU time of
one thread, so that a busy machine does not show; on a GPU the wall clock.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from benchmarks.engine_peers.shapes import Shape, build_model
from benchmarks.report import machine, paired_ratios, print_table, results_path, round_orders, write_json
from tg_tinker.types import LoRAConfig, TrainingConfig
from tg_tinker.types.tokens import PromptFigures, SampleEvent, SampleQuery, SamplingParams, response_of
from tg_tinker_server.engine.backend import EngineState
from tg_tinker_server.engine.performance import PerformanceConfig
from tg_tinker_server.engine.sampling.seam import Ticket
from tg_tinker_server.engine.sampling.torch_weights import TorchWeights, computing
from tg_tinker_server.engine.tokenizers import ByteTokenizer
from tg_tinker_server.engine.torch_backend import TorchBackend

SHAPES = {
    "small": Shape(name="small", hidden=64, layers=2, vocabulary=512, rank=8, records=1, tokens=1),
    "medium": Shape(name="medium", hidden=384, layers=6, vocabulary=8192, rank=16, records=1, tokens=1),
}
CLIENTS = (1, 8, 32)
RUNS = 4
GENERATE = "transformers.generate, one by one"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is asked in one round.

    Attributes:
        requests: in all, whatever the number of clients.
        shared, own: tokens of a prompt that all have, and that it has alone.
        new: tokens of each completion.
    """

    requests: int
    shared: int
    own: int
    new: int

    def prompts(self, vocabulary: int, seed: int) -> list[list[int]]:
        """The prompts of one round; other ones in each, so that nothing is remembered from the last."""
        rng = np.random.default_rng(seed)
        begin = rng.integers(0, vocabulary, self.shared).tolist()
        return [[*begin, *rng.integers(0, vocabulary, self.own).tolist()] for _ in range(self.requests)]


def opened(backend: TorchBackend, shape: Shape) -> list[TorchWeights]:
    """Weights of ``RUNS`` runs with random adapters."""
    config = TrainingConfig(
        model_ref=shape.name,
        lora_config=LoRAConfig(rank=shape.rank, target_modules="all-linear"),
        mixed_precision="fp32",
    )
    session = backend.open(run_id="bench", config=config)
    state = session.export_state(optimizer=False)
    session.close()
    weights = []
    for seed in range(RUNS):
        rng = np.random.default_rng(seed)
        tensors = {n: rng.normal(0, 0.02, v.shape).astype(np.float32) for n, v in state.tensors.items()}
        weights.append(backend.open_weights(config, EngineState(tensors=tensors, scalars=state.scalars)))
    return weights


def one_by_one(weights: Sequence[TorchWeights], prompts: Sequence[list[int]], load: Load) -> list[list[int]]:
    """What transformers generates, request after request."""
    out = []
    for i, prompt in enumerate(prompts):
        mine = weights[i % RUNS]
        ids = torch.tensor([prompt], device=next(mine.base.module.parameters()).device)
        with computing([mine]):
            made = mine.base.module.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=load.new,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        out.append(made[0, len(prompt) :].tolist())
    return out


def at_once(
    backend: TorchBackend, weights: Sequence[TorchWeights], load: Load, clients: int, prompts: Sequence[list[int]]
) -> list[list[int]]:
    """What our sampler makes of the same requests, so many of them under way at a time."""
    sampler = backend.token_sampler()
    params = SamplingParams(max_tokens=load.new, temperature=0.0, stop=[])
    waiting = list(enumerate(prompts))[::-1]
    under_way: dict[Ticket, int] = {}
    events: dict[int, list[SampleEvent]] = {i: [] for i in range(len(prompts))}
    while waiting or under_way:
        while waiting and len(under_way) < clients:
            i, prompt = waiting.pop()
            under_way[
                sampler.submit(weights[i % RUNS], SampleQuery(prompt=tuple(prompt), params=params), group=0)
            ] = i
        for progress in sampler.step():
            if progress.error is not None:
                raise progress.error
            i = under_way[progress.ticket]
            events[i].extend(progress.events)
            if isinstance(progress.events[-1], PromptFigures):
                del under_way[progress.ticket]
    return [response_of(events[i]).sequences[0].tokens for i in range(len(prompts))]


def measure(shape: Shape, load: Load, *, rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each contender in each round.

    Raises:
        RuntimeError: a contender's tokens are not those of transformers; nobody is fast by being wrong.
    """
    backend = TorchBackend(
        {shape.name: lambda: (build_model(shape), ByteTokenizer())}, PerformanceConfig(device=device)
    )
    weights = opened(backend, shape)
    vocabulary = weights[0].vocab_size
    contenders: dict[str, Callable[[Sequence[list[int]]], list[list[int]]]] = {
        GENERATE: lambda prompts: one_by_one(weights, prompts, load)
    }
    for clients in CLIENTS:
        contenders[f"{clients} at once"] = partial(at_once, backend, weights, load, clients)
    trial = load.prompts(vocabulary, seed=10_000)
    expected = contenders[GENERATE](trial)
    for name, work in contenders.items():
        right = sum(a == b for a, b in zip(work(trial), expected, strict=True))
        if right < 0.9 * load.requests:  # two tokens that are equally likely may change places by rounding
            raise RuntimeError(f"{name}: {load.requests - right} of {load.requests} completions differ")
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    clock = time.process_time if device == "cpu" else time.perf_counter
    for number, order in enumerate(round_orders(list(contenders), rounds=rounds)):
        prompts = load.prompts(vocabulary, seed=number)
        for name in order:
            started = clock()
            contenders[name](prompts)
            seconds[name].append(clock() - started)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--new", type=int, default=32, help="tokens of each completion")
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    facts, kept = machine(), {}
    for name in asked.shapes.split(","):
        for prompt, shared, own in (("own prompts of 64", 0, 64), ("192 shared and 8 own", 192, 8)):
            load = Load(requests=asked.requests, shared=shared, own=own, new=asked.new)
            seconds = measure(SHAPES[name], load, rounds=asked.rounds, device=asked.device)
            tokens = load.requests * load.new
            rates = {who: [tokens / s for s in spent] for who, spent in seconds.items()}
            ratios = paired_ratios(rates, GENERATE)
            kept[f"{name}, {prompt}"] = {"seconds": seconds, "ratios": ratios, "tokens": tokens}
            rows = [[who, f"{np.median(rate):,.0f}", str(ratios[who])] for who, rate in rates.items()]
            print_table(f"{name}: {prompt}, {load.new} new", ["requests", "tokens/s", "of generate"], rows)
    write_json(results_path("sampling", facts, device=asked.device), {"machine": facts, "loads": kept})


if __name__ == "__main__":
    main()

"""What is trained: two small models, a private run on each, the ways to write its loop."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from benchmarks.engine_peers.shapes import Shape, build_model, make_batches, vocabulary_of
from tg_tinker import BatchData, DPConfig, LoRAConfig, OptimizerConfig, TrainingClient, TrainingConfig
from tg_tinker_server.engine.models import BUNDLED_MODELS

BUNDLED_NAME = "tiny-llama-2m"
BUNDLED = Shape(name="bundled", model=BUNDLED_NAME, rank=16, records=32, tokens=64)
TINY_NAME = "bench-tiny"
TINY = Shape(name="tiny", hidden=64, layers=2, vocabulary=512, rank=8, records=8, tokens=32)  # 164,672 parameters

Loop = Callable[[TrainingClient, BatchData, int], None]


def tiny_models(folder: Path) -> dict[str, Path]:
    """What a server must be offered to train ``TINY``: its weights are written to ``folder``."""
    build_model(TINY).save_pretrained(folder)
    bundled = BUNDLED_MODELS[BUNDLED_NAME]
    assert isinstance(bundled, Path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled / name, folder)
    return {TINY_NAME: folder}


def private_config(shape: Shape) -> TrainingConfig:
    """A private run as the engine's own benchmark trains it, priced as a Poisson draw of one record in a hundred."""
    return TrainingConfig(
        model_ref=TINY_NAME if shape.model == "random" else shape.model,
        lora_config=LoRAConfig(rank=shape.rank, alpha=2 * shape.rank, target_modules="all-linear"),
        optimizer=OptimizerConfig(name="adamw", learning_rate=1e-4),
        dp_config=DPConfig(
            noise_multiplier=1.0, target_epsilon=1e4, sampling="poisson", dataset_size=100 * shape.records
        ),
        batch_size=shape.records,
        mixed_precision="fp32",
    )


def batch_of(shape: Shape) -> BatchData:
    """The batch that every step of this shape takes, the same as in process."""
    (batch,) = make_batches(shape, shape.vocabulary or vocabulary_of(shape, build_model(shape)))
    return BatchData(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)


def one_by_one(client: TrainingClient, batch: BatchData, steps: int) -> None:
    """Each result is fetched before the next call is made."""
    for _ in range(steps):
        client.forward_backward(batch).result()
        client.optim_step().result()


def in_pairs(client: TrainingClient, batch: BatchData, steps: int) -> None:
    """Both calls of a step, then both results: as the documentation has it."""
    for _ in range(steps):
        loss, stepped = client.forward_backward(batch), client.optim_step()
        loss.result()
        stepped.result()


def one_ahead(client: TrainingClient, batch: BatchData, steps: int) -> None:
    """The calls of the next step are made before the results of this one are fetched."""
    waiting = None
    for _ in range(steps):
        made = client.forward_backward(batch), client.optim_step()
        for future in waiting or ():
            future.result()
        waiting = made
    for future in waiting or ():
        future.result()


LOOPS: dict[str, Loop] = {"one by one": one_by_one, "in pairs": in_pairs, "one ahead": one_ahead}

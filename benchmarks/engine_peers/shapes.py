"""The model and batch shapes that the engine is measured on, built the same way for every contender.

Shape suffixes: B records, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.engine_peers import smollm2
from tg_tinker.types import IGNORE_INDEX
from tg_tinker_server.engine.models import BUNDLED_MODELS

Ints = npt.NDArray[np.int64]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = "all-linear"
HEAD_DIM = 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """One micro-batch: ids, mask (1 = real token) and labels, all [B, T]."""

    input_ids: Ints
    attention_mask: Ints
    labels: Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One row of the benchmark: a model, an adapter and the batches of one optimizer step.

    Attributes:
        hidden, layers, vocabulary: of a Llama with random weights; 0 where ``model`` names a real one.
        model: "random", the bundled model's name, or "smollm2-135m".
        rank: of the adapter; its alpha is twice that.
        targets: names of the adapted modules, or "all-linear".
        records, tokens: B and T of one micro-batch.
        padded: half of all tokens are padding.
        micro_batches: forward and backward passes per optimizer step.
    """

    name: str
    model: str = "random"
    hidden: int = 0
    layers: int = 0
    vocabulary: int = 0
    rank: int
    targets: tuple[str, ...] | str = ALL_LINEAR
    records: int
    tokens: int
    padded: bool = False
    micro_batches: int = 1

    @property
    def intermediate(self) -> int:
        """Width of the feed-forward layer: about 2.7 times hidden."""
        return self.hidden * 43 // 16

    @property
    def expected_batch_size(self) -> int:
        """Records per optimizer step."""
        return self.records * self.micro_batches

    def describe(self) -> str:
        """One line for people."""
        model = self.model
        if self.model == "random":
            model = (
                f"hidden {self.hidden}, {self.layers} layers of {self.hidden // HEAD_DIM} heads, feed-forward "
                f"{self.intermediate}, vocabulary {self.vocabulary}"
            )
        where = self.targets if isinstance(self.targets, str) else ",".join(t[0] for t in self.targets)
        times = f"{self.micro_batches} x " if self.micro_batches > 1 else ""
        padded = ", half of it padding" if self.padded else ""
        return f"{model}; r {self.rank} on {where}; {times}{self.records} x {self.tokens} tokens{padded}"


A = Shape(name="A", hidden=256, layers=4, vocabulary=32_000, rank=8, targets=ATTENTION, records=8, tokens=128)
B = Shape(name="B", hidden=512, layers=8, vocabulary=32_000, rank=16, records=8, tokens=128)
C = Shape(name="C", hidden=256, layers=4, vocabulary=1_024, rank=16, records=8, tokens=256)
D = Shape(name="D", model="tiny-llama-2m", rank=16, records=16, tokens=64)
E = Shape(name="E", model="smollm2-135m", rank=16, records=2, tokens=128)
AXES = (
    replace(A, name="A-r64", rank=64),
    replace(A, name="A-batch32", records=32),
    replace(A, name="A-tokens512", records=2, tokens=512),
    replace(A, name="A-padded", padded=True),
    replace(A, name="A-accumulated", records=2, micro_batches=4),
    replace(C, name="C-padded", padded=True),
)
QUICK = (A, B, C, D)
SHAPES = {shape.name: shape for shape in (*QUICK, *AXES, E)}


def unavailable(shape: Shape) -> str | None:
    """Why a shape cannot be measured here, or ``None``."""
    return smollm2.missing() if shape.model == "smollm2-135m" else None


def build_model(shape: Shape) -> Any:
    """A new copy of the shape's base model, float32 on the processor; the same weights every time."""
    if shape.model == "random":
        config = LlamaConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.hidden // HEAD_DIM,
            num_key_value_heads=shape.hidden // HEAD_DIM,
            vocab_size=shape.vocabulary,
            max_position_embeddings=max(1024, shape.tokens),
            use_cache=False,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return LlamaForCausalLM(config)
    if shape.model in BUNDLED_MODELS:
        source = BUNDLED_MODELS[shape.model]
        assert isinstance(source, str | Path)
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    return smollm2.load()


def vocabulary_of(shape: Shape, model: Any) -> int:
    """How many token ids the model knows."""
    return shape.vocabulary or int(model.get_input_embeddings().num_embeddings)


def lengths(shape: Shape) -> Ints:
    """Real tokens of each record [B]: all T, or with ``padded`` from a tenth of T upwards, half on average.

    >>> lengths(Shape(name="x", rank=1, records=4, tokens=100, padded=True)).tolist()
    [100, 10, 33, 57]
    """
    if not shape.padded:
        return np.full(shape.records, shape.tokens)
    # One record has full length, or a batch would simply be shorter. The others fill the half evenly.
    others = shape.records - 1
    mean = (shape.records / 2 - 1) / others
    if mean <= 0.1:
        raise ValueError(f"padding needs at least 3 records per batch, got {shape.records}")
    spread = np.linspace(0.1, 2 * mean - 0.1, others)
    return np.concatenate([[shape.tokens], np.maximum(2, np.floor(spread * shape.tokens)).astype(np.int64)])


def make_batches(shape: Shape, vocabulary: int) -> list[Batch]:
    """The micro-batches of one optimizer step: random ids, every real token a target, padding on the right."""
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(shape.micro_batches):
        ids = rng.integers(4, vocabulary, (shape.records, shape.tokens))  # below 4 lie special tokens
        mask = (np.arange(shape.tokens) < lengths(shape)[:, None]).astype(np.int64)
        labels = np.where(mask == 1, ids, IGNORE_INDEX)
        batches.append(Batch(input_ids=np.where(mask == 1, ids, 0), attention_mask=mask, labels=labels))
    return batches

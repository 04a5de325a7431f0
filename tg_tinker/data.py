"""Draws and packs batches: Poisson sampling that an epsilon may rely on, and padding."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import IGNORE_INDEX, BatchData, TrainingConfig, hash_batch

__all__ = ["PoissonSampler", "collate", "hash_batch"]

Indices = npt.NDArray[np.int64]
_BLOCK = 1 << 20  # units drawn at once: 8 MiB of random bytes


class PoissonSampler:
    """Draws every privacy unit independently with the same probability, anew for each step.

    This is the draw that "poisson" amplification assumes: sizes vary, a unit may come in neighbouring steps,
    and a draw may be empty. An empty draw is sent like any other (``collate([])``): leaving it out would
    tell that it was empty. Randomness comes from the operating system and cannot be seeded, because whoever
    knows the draw has no amplification.

    Attributes:
        dataset_size: number of privacy units.
        sample_rate: probability of each unit. The true one is never above it, and below by less than 2**-64.
        steps: how many draws iterating gives; ``None`` goes on for ever.

    >>> sampler = PoissonSampler(1000, 0.01, steps=3)
    >>> [len(indices) <= 1000 for indices in sampler]
    [True, True, True]
    """

    def __init__(self, dataset_size: int, sample_rate: float, *, steps: int | None = None) -> None:
        for name, holds, constraint in (
            ("dataset_size", dataset_size >= 1, ">= 1"),
            ("sample_rate", math.isfinite(sample_rate) and 0 < sample_rate <= 1, "0 < sample_rate <= 1"),
            ("steps", steps is None or steps >= 0, ">= 0, or None for no end"),
        ):
            if not holds:
                raise InvalidRequestError(f"{name} must be {constraint}", field=name, constraint=constraint)
        self.dataset_size = dataset_size
        self.sample_rate = sample_rate
        self.steps = steps
        self._threshold = int(Fraction(sample_rate) * 2**64)

    @classmethod
    def from_config(cls, config: TrainingConfig, steps: int | None = None) -> PoissonSampler:
        """The sampler a configuration declares; ``steps`` defaults to ``config.max_steps``.

        One draw is one logical batch. It may be larger than ``config.batch_size``: send it in one call, or in
        several ``forward_backward`` calls before the ``optim_step``.

        Raises:
            InvalidRequestError: the configuration does not claim Poisson sampling.
        """
        dp = config.dp_config
        if dp is None or dp.sampling != "poisson" or dp.dataset_size is None:
            raise InvalidRequestError(
                "the configuration does not claim Poisson sampling; set DPConfig(sampling='poisson', "
                "dataset_size=n), or build PoissonSampler(n, rate) yourself",
                field="dp_config.sampling",
                constraint="poisson",
            )
        return cls(dp.dataset_size, config.sample_rate, steps=config.max_steps if steps is None else steps)

    def draw(self) -> Indices:
        """One draw: sorted indices below ``dataset_size``, possibly none."""
        if self._threshold == 2**64:
            return np.arange(self.dataset_size, dtype=np.int64)
        parts = []
        for start in range(0, self.dataset_size, _BLOCK):
            count = min(_BLOCK, self.dataset_size - start)
            uniform = np.frombuffer(os.urandom(8 * count), dtype="<u8")
            parts.append(np.flatnonzero(uniform < np.uint64(self._threshold)) + start)
        return np.concatenate(parts).astype(np.int64, copy=False)

    def __iter__(self) -> Iterator[Indices]:
        drawn = 0
        while self.steps is None or drawn < self.steps:
            yield self.draw()
            drawn += 1


def collate(
    records: Sequence[Sequence[int]],
    pad_id: int = 0,
    *,
    labels: Sequence[Sequence[int]] | None = None,
    prompt_lengths: Sequence[int] | None = None,
    max_length: int | None = None,
) -> BatchData:
    """Pad token lists on the right into one batch, and mask the padding.

    Args:
        records: token ids, one list per record; none at all gives an empty batch of shape (0, 0).
        pad_id: fills the padding; any id of the vocabulary, it is masked.
        labels: per record, aligned with its tokens; -100 is ignored.
        prompt_lengths: instead of labels: so many tokens at the start of each record are no targets.
        max_length: cut records to their first ``max_length`` tokens; ``None`` cuts nothing.

    Raises:
        InvalidRequestError: labels or prompt_lengths do not fit the records, or both are given.

    >>> batch = collate([[5, 6, 7], [8]], prompt_lengths=[1, 0])
    >>> batch.labels.tolist()
    [[-100, 6, 7], [8, -100, -100]]
    """
    _check_fit(records, labels, prompt_lengths, max_length)
    cut = [list(record[:max_length]) for record in records]
    width = max((len(record) for record in cut), default=0)
    ids = np.full((len(cut), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(cut), width), dtype=np.int64)
    targets = np.full((len(cut), width), IGNORE_INDEX, dtype=np.int64)
    for i, record in enumerate(cut):
        n = len(record)
        start = min(prompt_lengths[i], n) if prompt_lengths is not None else 0
        own = record if labels is None else list(labels[i][:max_length])
        ids[i, :n], mask[i, :n], targets[i, start:n] = record, 1, own[start:]
    return BatchData(input_ids=ids, attention_mask=mask, labels=targets)


def _check_fit(
    records: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]] | None,
    prompt_lengths: Sequence[int] | None,
    max_length: int | None,
) -> None:
    for name, holds, constraint in (
        ("labels", labels is None or prompt_lengths is None, "either labels or prompt_lengths"),
        ("labels", labels is None or [len(x) for x in labels] == [len(r) for r in records], "as long as records"),
        ("prompt_lengths", prompt_lengths is None or len(prompt_lengths) == len(records), "one per record"),
        ("prompt_lengths", prompt_lengths is None or all(n >= 0 for n in prompt_lengths), ">= 0"),
        ("max_length", max_length is None or max_length >= 1, ">= 1, or None"),
    ):
        if not holds:
            raise InvalidRequestError(f"{name} must be {constraint}", field=name, constraint=constraint)

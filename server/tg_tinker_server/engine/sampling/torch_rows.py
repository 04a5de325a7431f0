"""Sampling from transformers models: keys and values of every sequence, in left-padded batches of any rows.

A sequence that joins brings its keys and values, one that leaves takes them along; the batch is laid out anew. What
models do with a cache differs, so each base is tried once (``_joins``); one that fails, or whose positions depend on
how wide a batch is, has its sequences computed alone and from their beginning.

Shape suffixes: B rows, H heads, T tokens, D head size, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tg_tinker_server.engine.lora import AdaptedBase
from tg_tinker_server.engine.sampling.rows import Memory, Reading, RunningRows
from tg_tinker_server.engine.sampling.seam import SampledWeights
from tg_tinker_server.engine.sampling.torch_anew import Anew, read_anew
from tg_tinker_server.engine.sampling.torch_weights import TorchWeights, computing

_SLACK = 64
"""Tokens that a batch has room for before its keys and values are copied again."""
KeyValues = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    """See ``rows.Memory``. Keys and values of each layer [1, H, T, D]."""

    layers: tuple[KeyValues, ...]

    @property
    def length(self) -> int:
        """See ``rows.Memory``."""
        return int(self.layers[0][0].shape[-2])

    @property
    def size_bytes(self) -> int:
        """See ``rows.Memory``."""
        return sum(t.numel() * t.element_size() for pair in self.layers for t in pair)

    def cut(self, length: int) -> _Kept:
        """See ``rows.Memory``."""
        return _Kept(tuple((k[..., :length, :], v[..., :length, :]) for k, v in self.layers))


class _RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A cache layer that writes new tokens into room kept for them, where the original copies all of it each time."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, used: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self._buffers = (keys, values)
        self._show(used)

    def _show(self, used: int) -> KeyValues:
        self._used = used
        shown = (self._buffers[0][..., :used, :], self._buffers[1][..., :used, :])
        self.keys, self.values = shown
        return shown

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> KeyValues:
        """Add tokens; returns all keys and values."""
        start, end = self._used, self._used + key_states.shape[-2]
        if end > self._buffers[0].shape[-2]:
            keys, values = self._buffers
            self._buffers = (_widened(keys, start, end + _SLACK), _widened(values, start, end + _SLACK))
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start:end, :] = new
        return self._show(end)


class TorchRows:
    """See ``rows.ModelRows``."""

    def key(self, weights: SampledWeights) -> Hashable | None:
        """See ``rows.ModelRows``."""
        mine = cast(TorchWeights, weights)
        return (id(mine.base), mine.shape) if _can_join(mine.base) else None

    def read(self, readings: Sequence[Reading]) -> list[tuple[Memory, npt.NDArray[Any]]]:
        """See ``rows.ModelRows``."""
        weights = [cast(TorchWeights, r.weights) for r in readings]
        if not _can_join(weights[0].base):
            return [read_anew(r) for r in readings]
        return _read(readings, weights)

    def rows(self, weights: SampledWeights) -> RunningRows:
        """See ``rows.ModelRows``."""
        mine = cast(TorchWeights, weights)
        return _Running(mine.base) if _can_join(mine.base) else Anew()


def _read(readings: Sequence[Reading], weights: Sequence[TorchWeights]) -> list[tuple[Memory, npt.NDArray[Any]]]:
    """Read with keys and values. Layout of a row: padding, memory, new tokens; only a row without memory may have
    fewer new tokens than the widest, so that nothing lies between a row's tokens.
    """
    order = sorted(range(len(readings)), key=lambda i: id(weights[i]))
    base = weights[0].base
    new = max(len(r.tokens) for r in readings)
    past = [r.memory.length if r.memory is not None else 0 for r in readings]
    old = max(past)
    if any(p and len(r.tokens) != new for p, r in zip(past, readings, strict=True)):
        raise ValueError("rows with memory read different numbers of tokens")
    cache = DynamicCache()
    if old:
        first = cast(_Kept, next(r.memory for r in readings if r.memory is not None))
        for layer, pair in enumerate(first.layers):
            buffers = [t.new_zeros(len(order), *t.shape[1:-2], old + new, t.shape[-1]) for t in pair]
            for row, i in enumerate(order):
                memory = readings[i].memory
                if memory is not None:
                    for buffer, part in zip(buffers, cast(_Kept, memory).layers[layer], strict=True):
                        buffer[row : row + 1, ..., old - past[i] : old, :] = part
            cache.layers.append(_RoomyLayer(buffers[0], buffers[1], old))
    ids_BT = torch.zeros(len(order), new, dtype=torch.int64)
    for row, i in enumerate(order):
        ids_BT[row, new - len(readings[i].tokens) :] = torch.tensor(readings[i].tokens)
    lengths = [past[i] + len(readings[i].tokens) for i in order]
    keep = max(r.logits for r in readings)
    logits_BTV = _forward(base, [weights[i] for i in order], ids_BT, lengths, old + new, cache, keep)
    pairs = _layers_of(cache, old + new)
    results: dict[int, tuple[Memory, npt.NDArray[Any]]] = {}
    for row, i in enumerate(order):
        kept = _row_of(pairs, row, lengths[row], copy=len(order) > 1 or lengths[row] < pairs[0][0].shape[-2])
        results[i] = (kept, logits_BTV[row, -readings[i].logits :].float().cpu().numpy())
    return [results[i] for i in range(len(readings))]


class _Running:
    """See ``rows.RunningRows``."""

    def __init__(self, base: AdaptedBase) -> None:
        self._base = base
        self._weights: list[TorchWeights] = []
        self._lengths: list[int] = []
        self._cache = DynamicCache()

    def arrange(self, rows: Sequence[int | tuple[SampledWeights, Memory]]) -> None:
        """See ``rows.RunningRows``. One copy of everything that stays."""
        stay = [(at, row) for at, row in enumerate(rows) if isinstance(row, int)]
        join = [(at, cast(_Kept, row[1])) for at, row in enumerate(rows) if not isinstance(row, int)]
        lengths = [self._lengths[row] if isinstance(row, int) else row[1].length for row in rows]
        width, before = max(lengths), self._width
        example = self._pairs() if stay else join[0][1].layers
        cache = DynamicCache()
        for layer, pair in enumerate(example):
            buffers = []
            for side, like in enumerate(pair):
                buffer = like.new_zeros(len(rows), *like.shape[1:-2], width + _SLACK, like.shape[-1])
                if stay:
                    shared = min(width, before)
                    to, from_ = (torch.tensor(index, device=like.device) for index in zip(*stay, strict=True))
                    buffer[to, ..., width - shared : width, :] = like[from_][..., before - shared : before, :]
                for at, kept in join:
                    buffer[at : at + 1, ..., width - kept.length : width, :] = kept.layers[layer][side]
                buffers.append(buffer)
            cache.layers.append(_RoomyLayer(buffers[0], buffers[1], width))
        self._weights = [self._weights[r] if isinstance(r, int) else cast(TorchWeights, r[0]) for r in rows]
        self._lengths, self._cache = lengths, cache

    def advance(self, tokens: Sequence[int]) -> npt.NDArray[Any]:
        """See ``rows.RunningRows``."""
        width = self._width + 1
        lengths = [length + 1 for length in self._lengths]
        ids_BT = torch.tensor(tokens, dtype=torch.int64).unsqueeze(1)
        logits_BTV = _forward(self._base, self._weights, ids_BT, lengths, width, self._cache, 1)
        self._lengths = lengths
        logits: npt.NDArray[Any] = logits_BTV[:, -1].float().cpu().numpy()
        return logits

    def take(self, row: int) -> Memory:
        """See ``rows.RunningRows``."""
        return _row_of(self._pairs(), row, self._lengths[row], copy=True)

    @property
    def _width(self) -> int:
        return int(self._cache.get_seq_length())

    def _pairs(self) -> tuple[KeyValues, ...]:
        return tuple((layer.keys, layer.values) for layer in cast(Any, self._cache).layers)


def _forward(
    base: AdaptedBase,
    weights: Sequence[TorchWeights],
    ids_BT: torch.Tensor,
    lengths: Sequence[int],
    width: int,
    cache: DynamicCache,
    keep: int,
) -> torch.Tensor:
    """Logits [B, keep, V] of the last positions; the cache then holds the new tokens too.

    Args:
        lengths: tokens of each row, known and new ones; the columns before them are padding.
        width: columns, known and new ones.
    """
    model: Any = base.module
    device = next(model.parameters()).device
    names = _parameters_of(cast(Hashable, type(model)))
    starts = torch.tensor([width - length for length in lengths], device=device)
    columns = torch.arange(width, device=device)
    options: dict[str, Any] = {}
    if "position_ids" in names:
        options["position_ids"] = (columns[None, -ids_BT.shape[1] :] - starts[:, None]).clamp(min=0)
    if "logits_to_keep" in names:
        options["logits_to_keep"] = keep
    mask_BT = None
    if any(length < width for length in lengths):
        mask_BT = (columns[None] >= starts[:, None]).long()
    with computing(weights):
        logits_BTV: torch.Tensor = model(
            input_ids=ids_BT.to(device), attention_mask=mask_BT, past_key_values=cache, use_cache=True, **options
        ).logits
    return logits_BTV[:, -keep:]


@cache
def _parameters_of(kind: Hashable) -> frozenset[str]:
    """Names of what a model takes."""
    return frozenset(inspect.signature(cast(Any, kind).forward).parameters)


def _layers_of(cache: DynamicCache, width: int) -> tuple[KeyValues, ...]:
    """Keys and values that a pass left.

    Raises:
        TypeError: this model keeps something else.
    """
    layers: list[Any] = cast(Any, cache).layers
    for layer in layers:
        keys = getattr(layer, "keys", None)
        if not isinstance(layer, DynamicLayer) or keys is None or keys.dim() != 4 or keys.shape[-2] != width:
            raise TypeError("this model keeps something else than keys and values of each token")
    if not layers:
        raise TypeError("this model keeps nothing")
    return tuple((layer.keys, layer.values) for layer in layers)


def _row_of(pairs: Sequence[KeyValues], row: int, length: int, *, copy: bool) -> _Kept:
    width = pairs[0][0].shape[-2]
    parts = [tuple(t[row : row + 1, ..., width - length : width, :] for t in pair) for pair in pairs]
    return _Kept(tuple((k.clone(), v.clone()) if copy else (k, v) for k, v in parts))


def _widened(buffer: torch.Tensor, used: int, width: int) -> torch.Tensor:
    wide = buffer.new_zeros(*buffer.shape[:-2], width, buffer.shape[-1])
    wide[..., :used, :] = buffer[..., :used, :]
    return wide


def _can_join(base: AdaptedBase) -> bool:
    if base.joins is None:
        base.joins = not base.language_model.shortcuts.by_length and _joins(base)
    return base.joins


def _joins(base: AdaptedBase) -> bool:
    """Whether rows that were read apart, and in pieces, get the same logits as whole ones: tried on random tokens."""
    device = next(base.module.parameters()).device
    generator = torch.Generator().manual_seed(7)
    texts = [torch.randint(base.loaded.vocab_size, (n,), generator=generator).tolist() for n in (7, 5, 6)]
    bare = TorchWeights(base, None, size_bytes=0, on_close=lambda: None)
    try:
        with computing([bare]):
            expected = [base.language_model.logits(torch.tensor([t], device=device))[0].float().cpu() for t in texts]
        first = _read([Reading(weights=bare, memory=None, tokens=t[:3], logits=1) for t in texts[:2]], [bare] * 2)
        # One goes on from its memory beside another that begins, then all three run together, the third joining late.
        more = [
            Reading(weights=bare, memory=first[0][0], tokens=texts[0][3:6], logits=3),
            Reading(weights=bare, memory=None, tokens=texts[2][:2], logits=2),
        ]
        second = _read(more, [bare] * 2)
        running = _Running(base)
        running.arrange([(bare, first[1][0]), (bare, second[0][0])])
        both = running.advance([texts[1][3], texts[0][6]])
        running.arrange([0, (bare, second[1][0])])
        late = running.advance([texts[1][4], texts[2][2]])
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    pairs = [
        (first[0][1][-1], expected[0][2]),
        (second[0][1], expected[0][3:6]),
        (second[1][1], expected[2][:2]),
        (both[0], expected[1][3]),
        (both[1], expected[0][6]),
        (late[0], expected[1][4]),
        (late[1], expected[2][2]),
    ]
    scale = max(float(e.abs().max()) for _, e in pairs) or 1.0
    allowed = (1e-5 if base.loaded.dtype == torch.float32 else 5e-2) * scale
    return all(float(np.abs(found - want.numpy()).max()) <= allowed for found, want in pairs)

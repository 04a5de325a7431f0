"""Updates of an adapter: which arrays a round trains, how they become one vector, what is refused.

An update is weights after minus weights before, in float32, of the arrays that the round trains and no others.

Shape suffixes: P parameters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import rfc8785

from tg_tinker.errors import FederationRefusedError
from tg_tinker.federated.messages import array_digest

Factor = Literal["a", "b"]
Weights = Mapping[str, npt.NDArray[np.float32]]
Layout = dict[str, tuple[int, ...]]
"""Shapes by name, in the order of the vector: sorted by name."""

_PARTS = {"a": {"lora_A", "lora_embedding_A"}, "b": {"lora_B", "lora_embedding_B"}}  # PEFT's names of the factors
_DOMAIN = b"tg-tinker/federated-weights/v1\x00"
_NAMED = 5  # names that a refusal lists at most


def trained_names(names: Iterable[str], frozen_factor: Factor | None) -> list[str]:
    """The arrays that a round trains, sorted: all but the frozen factor. What is no factor is always trained.

    >>> trained_names(["q.lora_B.weight", "q.lora_A.weight", "q.bias"], "a")
    ['q.bias', 'q.lora_B.weight']
    """
    frozen = _PARTS[frozen_factor] if frozen_factor is not None else set()
    return sorted(name for name in names if not frozen & set(name.split(".")))


def layout(arrays: Mapping[str, npt.NDArray[Any]]) -> Layout:
    """Where each array lies in the vector."""
    return {name: tuple(arrays[name].shape) for name in sorted(arrays)}


def size(shapes: Layout) -> int:
    """Length P of the vector."""
    return sum(_count(shape) for shape in shapes.values())


def flatten(arrays: Weights) -> npt.NDArray[np.float32]:
    """The arrays as one float32 vector [P], in the order of their names."""
    parts = [np.asarray(arrays[name], np.float32).ravel() for name in sorted(arrays)]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def unflatten(vector_P: npt.NDArray[Any], shapes: Layout) -> dict[str, npt.NDArray[np.float32]]:
    """Undo ``flatten``: copies, float32.

    Raises:
        FederationRefusedError: reason "bad_update": the vector is not of this layout's length.
    """
    if vector_P.shape != (size(shapes),):
        raise FederationRefusedError(
            f"a vector of shape {vector_P.shape} does not hold the {size(shapes)} parameters of the adapter",
            reason="bad_update",
        )
    arrays: dict[str, npt.NDArray[np.float32]] = {}
    start = 0
    for name in sorted(shapes):
        count = _count(shapes[name])
        arrays[name] = vector_P[start : start + count].astype(np.float32).reshape(shapes[name])
        start += count
    return arrays


def subtract(after: Weights, before: Weights, frozen_factor: Factor | None) -> dict[str, npt.NDArray[np.float32]]:
    """The update of a round: after minus before, of what it trained."""
    return {
        name: np.subtract(after[name], before[name], dtype=np.float32)
        for name in trained_names(before, frozen_factor)
    }


def check_update(
    arrays: Mapping[str, npt.NDArray[Any]],
    like: Mapping[str, npt.NDArray[Any]] | Layout,
    factor: Factor | None,
    *,
    what: str = "the update",
) -> None:
    """Require the names, shapes and type of an update, and that every number is finite.

    Args:
        like: the whole adapter, or its layout.
        factor: the frozen factor of the round; ``None`` also checks a whole adapter.
        what: the subject of the refusal.

    Raises:
        FederationRefusedError: reason "bad_update". The message holds names, shapes and types, never values.
    """
    shapes = {name: tuple(v) if isinstance(v, tuple) else tuple(v.shape) for name, v in like.items()}
    expected = trained_names(shapes, factor)
    missing, foreign = sorted(set(expected) - set(arrays)), sorted(set(arrays) - set(expected))
    if missing or foreign:
        raise _bad(
            f"{what} does not hold the arrays that this round trains: missing {_some(missing)}, not expected "
            f"{_some(foreign)}"
        )
    for name in expected:
        array = arrays[name]
        if array.dtype != np.float32:
            raise _bad(f"{name[:200]!r} in {what} is of type {array.dtype}; float32 was expected")
        if tuple(array.shape) != shapes[name]:
            raise _bad(f"{name[:200]!r} in {what} has shape {array.shape}; {shapes[name]} was expected")
        if not np.isfinite(array).all():
            raise _bad(f"{name[:200]!r} in {what} holds a number that is not finite")


def weights_digest(arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    """SHA-256 over names, types, shapes and little-endian bytes of all arrays, hex: ``Job.adapter_digest``."""
    return hashlib.sha256(
        _DOMAIN + rfc8785.dumps({name: array_digest(array) for name, array in arrays.items()})
    ).hexdigest()


def _count(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name[:200]) for name in names[:_NAMED]) or "none"
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"


def _bad(message: str) -> FederationRefusedError:
    return FederationRefusedError(message, reason="bad_update")

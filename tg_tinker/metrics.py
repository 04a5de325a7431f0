"""Metrics of parts folded into metrics of the whole: the name says how, ``loss:sum`` adds up.

    name:reducer      mean | sum | min | max | slack | unique | hash_unordered | hash2

Means are weighted with how many outputs each part has.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tg_tinker.errors import InvalidRequestError

Number = float | int
_MASK = 2**64 - 1
_log = logging.getLogger("tg_tinker")


def split(name: str) -> tuple[str, str]:
    """A metric's own name and its reducer; whoever makes a metric that is to be reduced calls this.

    Raises:
        InvalidRequestError: not exactly one colon.

    >>> split("loss:sum")
    ('loss', 'sum')
    """
    own, colon, reducer = name.partition(":") if isinstance(name, str) else ("", "", "")
    if not own or not colon or not reducer or ":" in reducer:
        raise InvalidRequestError(
            f"the metric {name!r} is not named name:reducer, as 'loss:sum'; reducers: {', '.join(REDUCERS)}",
            field="metrics",
            constraint="name:reducer, exactly one colon",
        )
    return own, reducer


def reduce(chunks: Sequence[Mapping[str, Any]], weights: Sequence[float] | None = None) -> dict[str, Number]:
    """One set of metrics for all chunks.

    Only names of the first chunk are kept. One that another chunk lacks, or whose reducer nobody knows, is dropped
    with a warning.

    Args:
        weights: of the chunks in means: how many outputs each has. Default: all alike. Where all are 0 a mean is 0.

    Raises:
        InvalidRequestError: a name without exactly one colon.

    >>> reduce([{"x:mean": 1, "x:max": 1}, {"x:mean": 2, "x:max": 2}], [1, 3])
    {'x:mean': 1.75, 'x:max': 2.0}
    """
    given = [1.0] * len(chunks) if weights is None else [float(w) for w in weights]
    if len(given) != len(chunks):
        raise InvalidRequestError(
            f"{len(given)} weights for {len(chunks)} sets of metrics", field="weights", constraint="one per chunk"
        )
    reduced: dict[str, Number] = {}
    for name in chunks[0] if chunks else ():
        reducer = split(name)[1]
        values = [chunk[name] for chunk in chunks if name in chunk]
        if reducer not in REDUCERS:
            _log.warning("the metric %s is dropped: its reducer is none of %s", name, ", ".join(REDUCERS))
        elif len(values) < len(chunks):
            _log.warning("the metric %s is dropped: not every part of the batch has it", name)
        elif reducer == "unique":
            reduced[name] = values[0]
            reduced |= {f"{name}_{i}": value for i, value in enumerate(values[1:], start=1)}
        else:
            reduced[name] = REDUCERS[reducer](values, given)
    return reduced


def mean(values: Sequence[Number], weights: Sequence[float]) -> float:
    """The weighted mean; 0 where nothing has weight."""
    return float(np.average(values, weights=weights)) if sum(weights) else 0.0


def slack(values: Sequence[Number], weights: Sequence[float]) -> float:
    """The largest value minus the weighted mean."""
    return float(np.max(values)) - mean(values, weights)


def hash_unordered(values: Sequence[Any], weights: Sequence[float] = ()) -> int:  # noqa: ARG001 - as all reducers
    """An int64 that does not depend on the order of the values; sets and lists among them are taken apart."""
    flat = [x for value in values for x in (value if isinstance(value, set | frozenset | list | tuple) else (value,))]
    return hash(tuple(sorted(int(x) for x in flat)))


def hash2(values: Sequence[Number], weights: Sequence[float] = ()) -> int:  # noqa: ARG001 - as all reducers
    """The sum of all values modulo 2**64."""
    return sum(int(v) & _MASK for v in values) & _MASK


# "unique" is not here as a function: it does not fold, it numbers.
REDUCERS: dict[str, Callable[[Sequence[Any], Sequence[float]], Number]] = {
    "mean": mean,
    "sum": lambda values, _: float(np.sum(values)),
    "min": lambda values, _: float(np.min(values)),
    "max": lambda values, _: float(np.max(values)),
    "slack": slack,
    "unique": lambda values, _: values[0],
    "hash_unordered": hash_unordered,
    "hash2": hash2,
}
"""What may stand behind the colon."""

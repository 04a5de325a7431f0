"""Flower's own strategies combine our checked updates: their arithmetic, nothing else of them.

Flower weighs by a count of examples, which sites do not tell: every update counts the same. It is given updates, not
weights, in float64, so that Krum's distances are not lost in the length of the model. Its constructors are given what
the job says; where it has defaults that the job does not name, they are stated here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower

from tg_tinker.federated.flower.records import MESSAGE_TYPE
from tg_tinker.federated.job import Strategy

Floats = Mapping[str, npt.NDArray[np.float64]]
_WEIGHT = "num-examples"


def combine(
    settings: Strategy,
    updates: Sequence[Mapping[str, npt.NDArray[Any]]],
    *,
    round_: int,
    moments: tuple[Floats, Floats],
) -> tuple[dict[str, npt.NDArray[np.float64]], tuple[Floats, Floats]]:
    """One change of the model from the updates of a round.

    Args:
        settings: of the job.
        updates: checked: the same names and shapes, finite. At least one.
        round_: from 1; the bias correction of FedAdam is that of Adam at step ``round_ + 1``, as Flower has it.
        moments: m and v of FedAdam and FedYogi for these names, zeros before the first round.

    Returns:
        The change, and the new moments; the others leave the moments as they are.
    """
    made = _strategy(settings, len(updates))
    if isinstance(made, flower.FedAdam | flower.FedYogi):
        made.m_t, made.v_t = dict(moments[0]), dict(moments[1])
        # The current model is zero, because what is combined are differences to it.
        made.current_arrays = {name: np.zeros(value.shape) for name, value in updates[0].items()}
    with _quiet():
        arrays, _ = made.aggregate_train(round_, [_message(update) for update in updates])
    assert arrays is not None  # there was at least one reply, and none is an error
    change = {name: array.numpy() for name, array in arrays.items()}
    if isinstance(made, flower.FedAdam | flower.FedYogi):
        assert made.m_t is not None
        assert made.v_t is not None
        return change, (made.m_t, made.v_t)
    return change, moments


def _strategy(settings: Strategy, replies: int) -> flower.FedAvg:
    malicious = settings.num_malicious
    # The most that keeps Krum's guarantee: m <= n - f - 2 (Damaskinos et al. 2019, AggregaThor).
    chosen = max(1, replies - malicious - 2)
    adaptive: dict[str, Any] = {
        "eta": settings.server_learning_rate,
        "beta_1": settings.betas[0],
        "beta_2": settings.betas[1],
        "tau": settings.tau,
    }
    table: dict[str, Callable[[], flower.FedAvg]] = {
        "fedavg": flower.FedAvg,
        "fedprox": partial(flower.FedProx, proximal_mu=settings.proximal_mu),  # the pull itself is the sites' part
        "fedadam": partial(flower.FedAdam, **adaptive),
        "fedyogi": partial(flower.FedYogi, **adaptive),
        "fedmedian": flower.FedMedian,
        "fedtrimmedavg": partial(flower.FedTrimmedAvg, beta=settings.trimmed_fraction),
        "krum": partial(flower.Krum, num_malicious_nodes=malicious),
        "multikrum": partial(flower.MultiKrum, num_malicious_nodes=malicious, num_nodes_to_select=chosen),
    }
    return table[settings.name]()


@contextmanager
def _quiet() -> Iterator[None]:
    """Flower tells how many replies it was given; the coordinator tells that itself, by name."""
    log = logging.getLogger("flwr")
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(before)


def _message(update: Mapping[str, npt.NDArray[Any]]) -> Message:
    arrays = ArrayRecord({name: Array(np.asarray(update[name], np.float64)) for name in sorted(update)})
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({_WEIGHT: 1})})
    # Outside of a Flower process a message needs its metadata; the strategies read none of it.
    nowhere = Metadata(0, "", 0, 0, "", "", created_at=0.0, ttl=1.0, message_type=MESSAGE_TYPE)
    return Message(content=content, metadata=nowhere)  # type: ignore[call-overload,no-any-return]

"""From the updates of a round to the next model: checked here, combined by Flower's strategies, applied here.

Only what the round trained is touched: a factor that was frozen in it leaves the round bit for bit as it came.

Shape suffixes: P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tg_tinker.errors import FederationRefusedError, InvalidRequestError
from tg_tinker.federated.job import Job, Strategy
from tg_tinker.federated.updates import Factor, Weights, check_update, trained_names

Floats = Mapping[str, npt.NDArray[np.float64]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moments:
    """What FedAdam and FedYogi remember from round to round, by name of the array. Names never seen are zeros."""

    m: Floats = field(default_factory=dict)
    v: Floats = field(default_factory=dict)

    def of(self, like: Mapping[str, npt.NDArray[Any]]) -> tuple[Floats, Floats]:
        """m and v for the arrays of an update."""
        zeros = {name: np.zeros(array.shape) for name, array in like.items()}
        m, v = ({name: kept.get(name, zeros[name]) for name in zeros} for kept in (self.m, self.v))
        return m, v

    def __bool__(self) -> bool:
        return bool(self.m)


def checked_update(
    update: Mapping[str, npt.NDArray[Any]], weights: Weights, factor: Factor | None, *, max_norm: float | None = None
) -> Mapping[str, npt.NDArray[np.float32]]:
    """An update that can be combined: names, shapes, float32, finite, and not longer than allowed. Zero is fine.

    The weights that it alone would make are finite too, so that those of any mean of checked updates are: the mean
    lies between them.

    Args:
        max_norm: L2 norm over all arrays; ``None`` allows any.

    Raises:
        FederationRefusedError: reason "bad_update".
    """
    check_update(update, weights, factor)
    with np.errstate(over="ignore"):
        if not all(np.isfinite(weights[name] + value).all() for name, value in update.items()):
            raise FederationRefusedError(
                "the update would make numbers of the model infinite: it is far too large", reason="bad_update"
            )
    if max_norm is not None and update_norm(update) > max_norm:
        raise FederationRefusedError(
            f"the update is longer than max_update_norm = {max_norm:g}, the most that this coordinator takes",
            reason="bad_update",
        )
    return update


def update_norm(update: Mapping[str, npt.NDArray[Any]]) -> float:
    """L2 norm over all arrays, in float64: no float32 can overflow it."""
    return float(np.sqrt(sum(float(np.square(value, dtype=np.float64).sum()) for value in update.values())))


def combined(
    strategy: Strategy,
    weights: Weights,
    updates: Sequence[Weights],
    *,
    factor: Factor | None,
    round_: int,
    moments: Moments,
) -> tuple[dict[str, npt.NDArray[np.float32]], Moments]:
    """The model after a round, and what the strategy remembers.

    Args:
        strategy: of the job.
        weights: the whole model before the round.
        updates: checked, at least one, all alike; the mean alone where the privacy of sites or masks leave no more.
        factor: frozen in the round.

    Raises:
        FederationRefusedError: reason "bad_update": the model would not be finite any more.
        InvalidRequestError: Flower is not installed.
    """
    try:
        from tg_tinker.federated.flower.strategies import combine
    except ModuleNotFoundError as e:
        raise InvalidRequestError(
            "the coordinator's strategies are Flower's: pip install 'tg-tinker[federation]'",
            field="strategy",
            constraint="flwr installed",
        ) from e
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused below
        change, (m, v) = combine(strategy, updates, round_=round_, moments=moments.of(updates[0]))
        after = {name: np.array(value, dtype=np.float32) for name, value in weights.items()}
        for name in trained_names(weights, factor):
            after[name] = (weights[name].astype(np.float64) + change[name]).astype(np.float32)
    if not all(np.isfinite(value).all() for value in after.values()):
        raise FederationRefusedError(
            f"round {round_} would make numbers of the model infinite: what sites sent is far too large; give "
            "a smaller max_update_norm in the coordinator's configuration, or take a robust strategy",
            reason="bad_update",
        )
    adaptive = strategy.name in ("fedadam", "fedyogi")
    return after, Moments(m={**moments.m, **m}, v={**moments.v, **v}) if adaptive else moments


def check_robust(job: Job) -> None:
    """Require that a robust strategy can bear somebody's poison even in the smallest round that counts.

    Raises:
        FederationRefusedError: reason "too_few_sites"; it says how many are needed.
    """
    strategy, sites = job.strategy, job.min_sites
    match strategy.name:
        case "fedmedian":
            needed, why = 3, "a median of two is their mean"
        case "fedtrimmedavg":
            cut = strategy.trimmed_fraction
            needed = next((n for n in range(1, 1000) if int(cut * n) >= 1), 1000)
            why = f"trimmed_fraction {cut:g} cuts off nobody among fewer"
        case "krum" | "multikrum":
            needed = 2 * strategy.num_malicious + 3
            why = f"to bear num_malicious = {strategy.num_malicious} it takes 2 f + 3 (Blanchard et al. 2017)"
        case _:
            return
    if sites < needed:
        raise FederationRefusedError(
            f"{strategy.name} needs min_sites of at least {needed}, not {sites}: {why}",
            reason="too_few_sites",
            details={"min_sites": sites, "needed": needed},
        )


def poison_borne(job: Job) -> int:
    """How many poisoned updates the job's strategy bears in the smallest round that counts; 0 for averages."""
    strategy, sites = job.strategy, job.min_sites
    match strategy.name:
        case "fedmedian":
            return (sites - 1) // 2
        case "fedtrimmedavg":
            return int(strategy.trimmed_fraction * sites)
        case "krum" | "multikrum":
            return strategy.num_malicious
        case _:
            return 0

"""Epsilon of a history of releases, by the gate's arithmetic and by two accountants that share nothing with it.

A history is a histogram: how often each (noise_multiplier, sample_rate) was released; rate 1 is a release without
amplification. Nothing here needs a server. Loss distributions need the package ``dp-accounting``, by Google, which
comes with ``pip install 'tg-tinker[audit]'``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any

from tg_tinker.errors import InvalidRequestError
from tg_tinker.privacy import renyi

PLUGINS = "tg_tinker.accountants"
Histogram = Mapping[tuple[float, float], int]

_PLD_RELEASES = 1_000_000  # of one kind; dp_accounting needs minutes for ten times as many
_PLD_CELLS = 1e5  # of the loss that matters; a coarser grid only makes the pessimistic result larger
_FINEST = 1e-9
_TAIL_DELTA = 1e-10  # the composed loss is held up to its epsilon here


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfilePoint:
    """One point of a privacy profile: the history is (epsilon, delta)-differentially private."""

    epsilon: float
    delta: float


def gate_costs(histogram: Histogram) -> renyi.Costs:
    """What the server's gate has charged for the history: integer Renyi costs, shape [orders].

    Raises:
        InvalidRequestError: a noise multiplier, rate or count that no release can have.
    """
    total = renyi.zero()
    for (sigma, rate), times in _checked(histogram).items():
        total = renyi.add(total, renyi.repeated(renyi.step_costs(sigma, rate), times))
    return total


def gate_epsilon(histogram: Histogram, delta: float) -> float:
    """Epsilon by the gate: a Renyi filter, true even when noise, rate and stopping time were chosen along the way.

    The same integers as the server's. Another processor may round a logarithm the other way, which moves the cost of
    a release by at most one unit of 2^-40 (9.1e-13), and the result by that times the number of releases.

    Raises:
        InvalidRequestError: a noise multiplier, rate, count or delta that no release can have.
    """
    return renyi.epsilon(gate_costs(histogram), _delta(delta))


def pld_epsilon(histogram: Histogram, delta: float) -> float:
    """Epsilon by privacy loss distributions (dp_accounting, pessimistic): an upper bound for a fixed schedule.

    inf where the distribution cannot be computed: too little noise, or over a million releases of one kind.

    Raises:
        InvalidRequestError: an impossible history or delta, or dp-accounting is not installed.
    """
    composed = loss_distribution(histogram)
    return math.inf if composed is None else float(composed.get_epsilon(_delta(delta)))


def privacy_profile(
    histogram: Histogram, *, deltas: Sequence[float] | None = None, epsilons: Sequence[float] | None = None
) -> tuple[ProfilePoint, ...]:
    """Pairs of epsilon and delta that all hold at once, by privacy loss distributions (pessimistic).

    Args:
        histogram: the history.
        deltas: ask for epsilon at each of these, or
        epsilons: ask for delta at each of these.

    Raises:
        InvalidRequestError: neither or both are given, a value is out of range, or dp-accounting is not installed.
    """
    if (deltas is None) == (epsilons is None):
        raise InvalidRequestError("give either deltas or epsilons", field="deltas", constraint="one of the two")
    composed = loss_distribution(histogram)
    if deltas is not None:
        at = [_delta(d) for d in deltas]
        return tuple(
            ProfilePoint(epsilon=math.inf if composed is None else float(composed.get_epsilon(d)), delta=d)
            for d in at
        )
    points = []
    for asked in epsilons or ():
        if not asked >= 0:
            raise InvalidRequestError("epsilon must be 0 or more", field="epsilons", constraint=">= 0")
        bound = 1.0 if composed is None else min(1.0, float(composed.get_delta(asked)))
        points.append(ProfilePoint(epsilon=asked, delta=bound))
    return tuple(points)


def prv_epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """Epsilon by PRV (Gopi et al. 2021), an upper bound for equal releases whose number is fixed in advance.

    Opacus computes it, which comes with the server's dependencies; they join by the entry point ``prv`` of
    ``tg_tinker.accountants``. inf where its grid would be too large.

    Raises:
        InvalidRequestError: impossible values, or the server's dependencies are not installed.
    """
    counts = _checked({(noise_multiplier, sample_rate): steps})
    found = _prv()
    if found is None:
        raise InvalidRequestError(
            "the PRV accountant comes with the server: pip install 'tg-tinker[server]'",
            field="accountant",
            constraint="opacus installed",
        )
    return float(found(noise_multiplier, sample_rate, steps, _delta(delta))) if counts else 0.0


def installed(accountant: str) -> bool:
    """Whether the packages behind "rdp", "prv", "pld" or "gdp" are here."""
    if accountant == "pld":
        return find_spec("dp_accounting") is not None
    return accountant in ("rdp", "gdp") or (accountant == "prv" and _prv() is not None)


@cache
def _prv() -> Callable[[float, float, int, float], float] | None:
    for entry in entry_points(group=PLUGINS, name="prv"):
        try:
            found: Callable[[float, float, int, float], float] = entry.load()
        except ModuleNotFoundError:
            continue
        return found
    return None


def gdp_estimate(histogram: Histogram, delta: float) -> float | None:
    """The central-limit estimate (Bu et al. 2020, arXiv:1911.11607). NOT an upper bound; ``None`` if it says nothing.

    Raises:
        InvalidRequestError: an impossible history or delta.
    """
    delta = _delta(delta)
    squares = 0.0
    for (sigma, rate), times in _checked(histogram).items():
        exponent = sigma**-2.0 if sigma > 1e-150 else math.inf
        if exponent > 700.0:  # too little noise for a central limit to say anything
            return None
        squares += times * rate * rate * math.expm1(exponent)
    mu = math.sqrt(squares)
    if mu > 30.0:
        return None

    def delta_at(eps: float) -> float:
        # Dong, Roth and Su 2019, Corollary 2.13.
        tail = math.erfc((eps / mu + mu / 2) / math.sqrt(2)) / 2
        return math.erfc((eps / mu - mu / 2) / math.sqrt(2)) / 2 - (math.exp(eps + math.log(tail)) if tail else 0.0)

    if mu == 0.0 or delta_at(0.0) <= delta:
        return 0.0
    low, high = 0.0, mu * mu / 2 + 10.0 * mu + 1.0
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (low, middle) if delta_at(middle) <= delta else (middle, high)
    return high


def loss_distribution(histogram: Histogram, *, pessimistic: bool = True) -> Any | None:
    """dp_accounting's composed loss distribution, with ``get_epsilon(delta)`` and ``get_delta(epsilon)``.

    ``None`` where there is too little noise or there are too many releases to hold it in memory. Optimistic ones
    bound from below and are as coarse as their grid times the number of releases.
    """
    try:
        return _composed(tuple(sorted(_checked(histogram).items())), pessimistic)
    except ArithmeticError:  # a noise multiplier whose square float64 cannot hold
        return None


@dataclass(frozen=True, slots=True)
class _Nothing:
    """The loss of no release."""

    def get_epsilon(self, delta: float) -> float:  # noqa: ARG002 - holds at every delta
        return 0.0

    def get_delta(self, epsilon: float) -> float:  # noqa: ARG002 - holds at every epsilon
        return 0.0


@dataclass(frozen=True, slots=True)
class _Composed:
    distribution: Any

    def get_epsilon(self, delta: float) -> float:
        return float(self.distribution.get_epsilon_for_delta(delta))

    def get_delta(self, epsilon: float) -> float:
        return float(self.distribution.get_delta_for_epsilon(epsilon))


@lru_cache(maxsize=16)
def _composed(counts: tuple[tuple[tuple[float, float], int], ...], pessimistic: bool) -> Any | None:
    if not counts:
        return _Nothing()
    scale = renyi.epsilon(gate_costs(dict(counts)), _TAIL_DELTA)
    if not math.isfinite(scale) or max(times for _, times in counts) > _PLD_RELEASES:
        return None
    finest = max(_width(counts, scale) / _PLD_CELLS, _FINEST)
    interval = 2.0 ** math.ceil(math.log2(finest))  # a power of two, so that like histories share a step
    composed = _library().identity(value_discretization_interval=interval, pessimistic_estimate=pessimistic)
    for (sigma, rate), times in counts:
        whole = rate >= 1.0  # Gaussians add up exactly: k of them are one with the noise divided by sqrt(k)
        step = _one_step(sigma / math.sqrt(times) if whole else sigma, rate, interval, pessimistic)
        composed = composed.compose(step if whole else step.self_compose(times))
    return _Composed(composed)


@lru_cache(maxsize=32)
def _one_step(sigma: float, rate: float, interval: float, pessimistic: bool) -> Any:
    """One step's loss distribution, half a second to make; never changed by composing it."""
    return _library().from_gaussian_mechanism(
        sigma,
        sampling_prob=rate,
        value_discretization_interval=interval,
        pessimistic_estimate=pessimistic,
        use_connect_dots=pessimistic,  # the finer method has no optimistic side
    )


def _width(counts: tuple[tuple[tuple[float, float], int], ...], scale: float) -> float:
    """The range of losses a grid must resolve: one step's, or 30 standard deviations of the sum, up to ``scale``.

    Only the resolution rests on it. dp_accounting decides what to cut off, and counts that as a loss without bound.
    """
    # Near order 1 the divergence is order / 2 times the variance of the loss.
    variance = sum(times * 2.0 * renyi.divergence(sigma, rate, 1.1) / 1.1 for (sigma, rate), times in counts)
    of_one_step = max(_largest_loss(sigma, rate) for (sigma, rate), _ in counts)
    return max(of_one_step, min(scale, 30.0 * math.sqrt(variance)))


def _largest_loss(sigma: float, rate: float) -> float:
    """The privacy loss of one step ten standard deviations out, where dp_accounting cuts it off."""
    exponent = 10.0 / sigma + 0.5 / sigma / sigma
    return exponent + math.log(rate) if exponent > 50.0 else math.log1p(rate * math.expm1(exponent))


def _library() -> Any:
    try:
        from dp_accounting.pld import privacy_loss_distribution
    except ModuleNotFoundError as e:
        raise InvalidRequestError(
            "privacy loss distributions need the package dp-accounting: pip install 'tg-tinker[audit]'",
            field="accountant",
            constraint="dp-accounting installed",
        ) from e
    return privacy_loss_distribution


def _checked(histogram: Histogram) -> dict[tuple[float, float], int]:
    for (sigma, rate), times in histogram.items():
        if not (sigma > 0 and math.isfinite(sigma)):
            raise InvalidRequestError(
                f"noise_multiplier must be positive and finite, got {sigma}",
                field="noise_multiplier",
                constraint="> 0",
            )
        if not 0 < rate <= 1:
            raise InvalidRequestError(
                f"sample_rate must lie in (0, 1], got {rate}", field="sample_rate", constraint="0 < rate <= 1"
            )
        if times < 0:
            raise InvalidRequestError(f"a release cannot happen {times} times", field="steps", constraint=">= 0")
    return {key: times for key, times in histogram.items() if times}


def _delta(delta: float) -> float:
    if not 0 < delta < 1:
        raise InvalidRequestError(
            f"delta must lie strictly between 0 and 1, got {delta}", field="delta", constraint="0 < delta < 1"
        )
    return delta

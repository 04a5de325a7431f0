"""A reference for epsilon over the grid of noise, rate, steps and delta: ``python -m tests.golden.epsilon_grid``.

The reference is an upper bound on the true epsilon that shares no code with the accountants under test:

* at rate 1, the exact epsilon of the k-fold Gaussian (Balle and Wang 2018, Theorem 8);
* below it, dp_accounting's pessimistic privacy loss distribution of one step (connect-the-dots, Doroshenko et al.
  2022), composed here. dp_accounting's own composition takes a Fourier transform to the power of the number of steps,
  whose rounding error, 1e-16 a step, swamps a delta of 1e-12 after a million. We tilt the distribution exponentially
  toward the losses that decide epsilon at this delta before the transform, and back after it: the error is then
  relative to delta.

An accountant at or above an upper bound on the truth is never below the truth. What the bound itself overstates only
makes the test harder to pass.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from dp_accounting.pld import privacy_loss_distribution
from scipy.special import log_ndtr, logsumexp

from tg_tinker_server.dp.accounting import cost, epsilon, prv_epsilon, repeated
from tg_tinker_server.dp.events import SampledGaussian

SIGMAS = (0.1, 0.3, 0.5, 0.7, 1.0, 2.0, 4.0, 8.0, 20.0)
RATES = (1e-9, 1e-7, 1e-5, 1e-3, 0.01, 0.1, 0.5, 0.9, 0.999999, 1.0)
STEPS = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)
DELTAS = (1e-3, 1e-5, 1e-8, 1e-12)
PRV_DELTAS = (1e-5, 1e-12)  # PRV takes up to two seconds at each
TABLE = Path(__file__).with_name("epsilon_grid.json")

_TILTS = np.geomspace(1e-4, 1e3, 71)
_CELLS = 2**16
_WINDOW = 2**17  # of the composed distribution, in cells


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One place of the grid: two accountants' epsilon beside the reference, an upper bound on the truth.

    ``overstated`` bounds how far the reference can lie above the truth: the grid of the loss distribution makes it,
    halving the grid at least halves it, so it is at most what halving took away. Computed where PRV is finite, since
    PRV stands a hundredth above the truth; 0 where the reference is exact.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int
    delta: float
    reference: float
    overstated: float
    gate: float
    prv: float


def gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    """The exact epsilon of one Gaussian release, by bisection on its delta in logarithms."""
    s = noise_multiplier

    def log_delta(eps: float) -> float:
        first, second = log_ndtr(0.5 / s - eps * s), eps + log_ndtr(-0.5 / s - eps * s)
        return float(first + math.log(-math.expm1(min(second - first, -1e-300))))

    if log_delta(0.0) <= math.log(delta):
        return 0.0
    low, high = 0.0, 1.0
    while log_delta(high) > math.log(delta):
        low, high = high, 2.0 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if log_delta(middle) > math.log(delta) else (low, middle)
    return high


def reference(
    noise_multiplier: float, sample_rate: float, steps: int, deltas: Sequence[float], *, fineness: int = 1
) -> list[float]:
    """An upper bound on the true epsilon at each delta; ``fineness`` divides the interval of its grid."""
    if sample_rate == 1.0:
        return [gaussian_epsilon(noise_multiplier / math.sqrt(steps), delta) for delta in deltas]
    smallest = _largest_loss(noise_multiplier, sample_rate) / _CELLS
    rough = 16 * smallest  # to learn where to look; the tilts need no precision
    coarse = _one_step(noise_multiplier, sample_rate, rough)
    tilts = [_best_tilts(step, steps, deltas, rough) for step in coarse]
    widest = max(_tilted(step, tilt, rough)[3] for step, own in zip(coarse, tilts, strict=True) for tilt in own)
    interval = max(smallest, 24.0 * math.sqrt(steps) * widest * rough / _WINDOW) / fineness
    both = _one_step(noise_multiplier, sample_rate, interval)
    return [
        max(
            _epsilon_at(step, steps, own[i], delta, interval, _WINDOW * fineness)
            for step, own in zip(both, tilts, strict=True)
        )
        for i, delta in enumerate(deltas)
    ]


@dataclass(frozen=True, slots=True)
class _Step:
    """One step's losses: ``probabilities`` of ``lowest``, ``lowest`` + 1, ... intervals, and of an infinite loss."""

    lowest: int
    probabilities: npt.NDArray[np.float64]
    infinite: float


def _event(noise_multiplier: float, sample_rate: float) -> SampledGaussian:
    return SampledGaussian(noise_multiplier=noise_multiplier, sample_rate=sample_rate, vouched_by="server")


def _largest_loss(sigma: float, rate: float) -> float:
    """The privacy loss of one step ten standard deviations out, where dp_accounting cuts it off."""
    exponent = (10.0 * sigma + 0.5) / sigma**2
    largest = exponent + math.log(rate) if exponent > 50 else math.log1p(rate * math.expm1(exponent))
    return max(largest, -math.log1p(-rate), 1e-7)


def _one_step(sigma: float, rate: float, interval: float) -> list[_Step]:
    whole = privacy_loss_distribution.from_gaussian_mechanism(
        sigma, sampling_prob=rate, value_discretization_interval=interval
    )
    steps = []
    for pmf in (whole._pmf_remove, whole._pmf_add):
        dense = pmf.to_dense_pmf()
        steps.append(_Step(dense._lower_loss, np.asarray(dense._probs), float(dense._infinity_mass)))
    return steps


def _tilted(step: _Step, tilt: float, interval: float) -> tuple[npt.NDArray[np.float64], float, float, float]:
    """Tilted probabilities, log of the moment, and mean and standard deviation in cells from the lowest."""
    cells = np.arange(len(step.probabilities), dtype=np.float64)
    with np.errstate(divide="ignore"):
        logs = np.log(step.probabilities) + tilt * interval * cells
    top = float(logs.max())
    weights = np.exp(logs - top)
    moment = float(weights.sum())
    probabilities = weights / moment
    mean = float((probabilities * cells).sum())
    deviation = math.sqrt(float((probabilities * (cells - mean) ** 2).sum()))
    return probabilities, top + math.log(moment), mean, deviation


def _best_tilts(step: _Step, steps: int, deltas: Sequence[float], interval: float) -> list[float]:
    """Where the tilted sum sits on epsilon: the tilt whose Chernoff bound on it is the least, for each delta."""
    losses = (step.lowest + np.arange(len(step.probabilities), dtype=np.float64)) * interval
    with np.errstate(divide="ignore"):
        logs = np.log(step.probabilities)
    moments = np.array([float(logsumexp(logs + tilt * losses)) for tilt in _TILTS])
    return [float(_TILTS[np.argmin((steps * moments - math.log(delta)) / _TILTS)]) for delta in deltas]


def _epsilon_at(step: _Step, steps: int, tilt: float, delta: float, interval: float, window: int) -> float:
    """Epsilon of ``steps`` of them, from the tilted distribution of the sum inside a window around its mean."""
    probabilities, log_moment, mean, _ = _tilted(step, tilt, interval)
    size = max(window, 2 ** math.ceil(math.log2(2 * len(probabilities))))
    first = max(0, round(steps * mean) - size // 2)  # cells above steps * lowest
    summed = np.fft.irfft(np.fft.rfft(probabilities, size) ** steps, size)
    summed = np.maximum(np.roll(summed, -(first % size)), 0.0)
    cells = first + np.arange(size, dtype=np.float64)
    losses = (steps * step.lowest + cells) * interval
    with np.errstate(divide="ignore"):
        logs = np.log(summed) + (steps * log_moment - tilt * interval * cells)
    left = delta + math.expm1(steps * math.log1p(-step.infinite))  # an infinite loss exceeds every epsilon
    # delta(eps) = sum over losses l > eps of p(l) (1 - exp(eps - l)), for eps at each loss, from the right.
    mass = np.logaddexp.accumulate(logs[::-1])[::-1]
    scaled = np.logaddexp.accumulate((logs - losses)[::-1])[::-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        at = mass + np.log(-np.expm1(np.minimum(losses + scaled - mass, 0.0)))
    if left <= 0:
        return math.inf
    if losses[-1] <= 0:  # all but a share of exp(-70) lies in the window
        return 0.0
    over = np.flatnonzero((at > math.log(left)) & (losses > 0))
    # Epsilon lies between the k-th loss and the one before; epsilon below 0 is of no interest.
    k = int(over[-1]) + 1 if len(over) else int(np.searchsorted(losses, 0.0, side="right"))
    if k >= size:
        return math.inf
    if mass[k] <= math.log(left):
        return max(0.0, float(losses[k - 1])) if k else 0.0
    # There delta is exp(mass) - exp(eps) * exp(scaled), both over the losses from the k-th on.
    return max(0.0, float(mass[k] + math.log1p(-math.exp(math.log(left) - mass[k])) - scaled[k]))


def points_at(sigma: float, rate: float, steps: int, deltas: Sequence[float]) -> Iterator[Point]:
    """The points at each delta; none where the gate says infinity, which nothing exceeds."""
    total = repeated(cost(_event(sigma, rate)), steps)
    if not math.isfinite(epsilon(total, 0.5)):
        return
    prv = [prv_epsilon(sigma, rate, steps, delta) if delta in PRV_DELTAS else math.inf for delta in deltas]
    coarse = fine = reference(sigma, rate, steps, deltas)
    if rate < 1 and any(math.isfinite(value) for value in prv):
        fine = reference(sigma, rate, steps, deltas, fineness=2)
    for delta, by_prv, first, second in zip(deltas, prv, coarse, fine, strict=True):
        yield Point(
            noise_multiplier=sigma,
            sample_rate=rate,
            steps=steps,
            delta=delta,
            reference=min(first, second),
            overstated=max(0.0, first - second),
            gate=epsilon(total, delta),
            prv=by_prv,
        )


def whole_grid() -> Iterator[Point]:
    """Every point of the grid at which the gate says anything finite."""
    for sigma, rate, steps in itertools.product(SIGMAS, RATES, STEPS):
        yield from points_at(sigma, rate, steps, DELTAS)


def table(found: Sequence[Point]) -> dict[str, Any]:
    """The figures of a grid: how close each accountant comes to the reference, and where."""
    by_prv = [p for p in found if math.isfinite(p.prv)]
    rows = []
    for sigma, rate in sorted({(p.noise_multiplier, p.sample_rate) for p in found}):
        own = [p for p in found if (p.noise_multiplier, p.sample_rate) == (sigma, rate)]
        worst = min(own, key=gate_ratio)
        rows.append(
            {
                "noise_multiplier": sigma,
                "sample_rate": rate,
                "points": len(own),
                "smallest_ratio": _rounded(gate_ratio(worst)),
                "at": {"steps": worst.steps, "delta": worst.delta, "gate": worst.gate, "reference": worst.reference},
            }
        )
    return {
        "about": "Epsilon of the gate (rdp) and of prv over an upper bound on the truth; see epsilon_grid.py.",
        "command": "python -m tests.golden.epsilon_grid",
        "gate": {
            "points": len(found),
            "below_reference": sum(p.gate < p.reference for p in found),
            "smallest_ratio": _rounded(min(map(gate_ratio, found))),
            "largest_ratio_where_epsilon_is_0.1_to_20": _rounded(
                max(p.gate / p.reference for p in found if 0.1 <= p.reference <= 20)
            ),
        },
        "prv": {
            "points": len(by_prv),
            "below_truth": sum(p.prv < p.reference - p.overstated for p in by_prv),
            "smallest_margin": _rounded(min(p.prv - (p.reference - p.overstated) for p in by_prv)),
        },
        "rows": rows,
    }


def gate_ratio(point: Point) -> float:
    """The gate's epsilon over the reference; inf where the reference is below 1e-3, and no ratio says anything."""
    return point.gate / point.reference if point.reference > 1e-3 else math.inf


def _rounded(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


if __name__ == "__main__":
    TABLE.write_text(json.dumps(table(list(whole_grid())), indent=1) + "\n")
    print(f"written to {TABLE}")

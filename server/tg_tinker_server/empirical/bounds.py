"""What correct guesses prove about epsilon: the bound of one-run auditing, and how much it could prove at most.

Source: Steinke, Nasr and Jagielski 2023, "Privacy Auditing with One (1) Training Run", theorem 5.2 and appendix D.
The setting: m canaries, each put into the training data by its own fair coin; whoever sees the model guesses the
coins of r of them and abstains on the rest; v guesses are right. Neighbours differ by adding or removing one canary,
which is the ledger's relation, so the epsilon that is tested is the ledger's.

Shape suffixes: M canaries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]
Coins = npt.NDArray[np.bool_]

_PRECISION = 1e-6
_LARGEST = 100.0
"""Epsilons above it are not looked for: no number of canaries that fits into memory proves them."""


def p_value(*, canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Upper bound on the probability of ``correct`` or more right guesses under any (epsilon, delta)-DP mechanism.

    A right guess has probability at most q = e^epsilon / (1 + e^epsilon), as in randomized response, whatever was
    guessed right before. Delta adds at most 2 m delta max_i (P[v - i <= Bin(r, q) < v] / i).

    Args:
        canaries: m, each in the data with probability 1/2 independently of all others.
        guesses: r, abstentions left out.
        correct: v.

    Raises:
        ValueError: unless 0 <= correct <= guesses <= canaries, epsilon >= 0 and 0 <= delta <= 1.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"need 0 <= correct <= guesses <= canaries, got {correct}, {guesses}, {canaries}")
    if not (epsilon >= 0 and 0 <= delta <= 1):
        raise ValueError(f"need epsilon >= 0 and delta in [0, 1], got {epsilon}, {delta}")
    accuracy = 1.0 / (1.0 + np.exp(-epsilon))
    pure = float(stats.binom.sf(correct - 1, guesses, accuracy))
    if correct == 0 or delta == 0:
        return min(1.0, pure)
    below = np.arange(1, correct + 1)
    just_short = np.cumsum(stats.binom.pmf(correct - below, guesses, accuracy))
    return min(1.0, pure + 2.0 * canaries * delta * float(np.max(just_short / below)))


def epsilon_lower_bound(*, canaries: int, guesses: int, correct: int, delta: float, confidence: float) -> float:
    """The largest epsilon that the guesses refute with this confidence, rounded down; 0 if they refute none.

    If the mechanism is (epsilon, delta)-DP, the bound is above epsilon with probability at most 1 - confidence.
    """
    level = 1.0 - confidence

    def refuted(epsilon: float) -> bool:
        found = p_value(canaries=canaries, guesses=guesses, correct=correct, epsilon=epsilon, delta=delta)
        return found < level

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high) and high < _LARGEST:
        low, high = high, 2.0 * high
    while high - low > _PRECISION:
        middle = (low + high) / 2.0
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def most_provable(canaries: int, *, delta: float, confidence: float, shares: int = 1) -> float:
    """Power: the bound if every guess were right. No run with so many canaries can show a larger number.

    Args:
        shares: into how many tests the error probability is split (Bonferroni).
    """
    return epsilon_lower_bound(
        canaries=canaries,
        guesses=canaries,
        correct=canaries,
        delta=delta,
        confidence=1.0 - (1.0 - confidence) / shares,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Guessing:
    """How well the coins were guessed at one number of guesses fixed in advance."""

    guesses: int
    correct: int


def guess(scores_M: Floats, included_M: Coins, guesses: int) -> Guessing:
    """Guess "in" for high scores and "out" for low ones, and count what was right.

    Some guesses go half to the highest and half to the lowest scores. If every coin is guessed, the mean of the
    scores divides them: as many "in" as "out" would be wrong wherever the coins fell otherwise.

    Args:
        scores_M: one score per canary, larger for "in"; computed without looking at the coins.
        included_M: the coins.
        guesses: even, or the number of canaries.
    """
    if guesses == len(scores_M):
        return Guessing(guesses=guesses, correct=int(np.sum((scores_M > np.mean(scores_M)) == included_M)))
    order = np.argsort(scores_M, kind="stable")
    half = guesses // 2
    correct = np.sum(included_M[order[len(order) - half :]]) + np.sum(~included_M[order[:half]])
    return Guessing(guesses=2 * half, correct=int(correct))


@dataclass(frozen=True, slots=True, kw_only=True)
class LowerBound:
    """The best of several numbers of guesses, each tested with its share of the error probability.

    Attributes:
        epsilon: the bound.
        confidence: of the whole.
        tried: what was guessed at each number of guesses.
        best: the one that gave the bound.
        p_value: of the claimed epsilon, corrected for how many numbers of guesses were tried.
        power: the largest bound that could have come out.
    """

    epsilon: float
    confidence: float
    tried: tuple[Guessing, ...]
    best: Guessing
    p_value: float
    power: float


def lower_bound(
    scores_M: Floats,
    included_M: Coins,
    *,
    claimed_epsilon: float,
    delta: float,
    confidence: float,
    fractions: tuple[float, ...] = (1.0, 0.2),
) -> LowerBound:
    """Bound epsilon from below, and test the claimed one.

    Args:
        fractions: of canaries guessed, fixed before anyone looked; the error probability is split evenly among them.
    """
    m = len(scores_M)
    counts = sorted(
        {m if fraction == 1.0 else max(2, 2 * int(m * fraction / 2)) for fraction in fractions}, reverse=True
    )
    tried = tuple(guess(scores_M, included_M, count) for count in counts)
    share = 1.0 - (1.0 - confidence) / len(tried)
    bounds = [
        epsilon_lower_bound(canaries=m, guesses=g.guesses, correct=g.correct, delta=delta, confidence=share)
        for g in tried
    ]
    values = [
        p_value(canaries=m, guesses=g.guesses, correct=g.correct, epsilon=claimed_epsilon, delta=delta) for g in tried
    ]
    winner = int(np.argmax(bounds))
    return LowerBound(
        epsilon=bounds[winner],
        confidence=confidence,
        tried=tried,
        best=tried[winner],
        p_value=min(1.0, len(tried) * min(values)),
        power=most_provable(m, delta=delta, confidence=confidence, shares=len(tried)),
    )

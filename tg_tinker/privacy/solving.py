"""The unknown of a plan, found by bisection over whole numbers: the last that fits, or the first."""

from __future__ import annotations

from collections.abc import Callable


def largest(fits: Callable[[int], bool], *, most: int) -> int:
    """The largest n up to ``most`` that fits, if all below it do; 0 if 1 does not. The answer was tried."""
    low, high = 0, 1
    while high < most and fits(high):
        low, high = high, min(2 * high, most)
    if high == most and fits(most):
        return most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def smallest(fits: Callable[[int], bool], *, least: int, most: int) -> int | None:
    """The smallest n from ``least`` to ``most`` that fits, if all above it do; ``None`` if none. It was tried."""
    low, high = least - 1, least
    while high < most and not fits(high):
        low, high = high, min(2 * high, most)
    if high == most and not fits(most):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high

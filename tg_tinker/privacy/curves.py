"""Epsilon over the steps of a plan: points to draw, few where an accountant is slow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One accountant's epsilon after a number of steps.

    Attributes:
        accountant: "rdp", "prv", "pld" or "gdp".
        points: (steps, epsilon), steps rising from 0 to the whole plan; empty where the accountant cannot say.
        bound: whether it is an upper bound on the true epsilon; the central-limit estimate is not.
    """

    accountant: str
    points: tuple[tuple[int, float], ...]
    bound: bool


def curve_of(
    accountant: str,
    steps: int,
    releases_after: Callable[[int], int],
    epsilon_at: Callable[[int], float | None],
    *,
    points: int,
) -> Curve:
    """Ask for epsilon at about ``points`` numbers of steps, closer together near 0, where it rises fastest.

    Args:
        accountant: its name.
        steps: of the whole plan.
        releases_after: how many releases those are.
        epsilon_at: epsilon of a number of releases; ``None`` or inf is left out.
        points: how many to ask for.
    """
    asked = {1} | {math.ceil(steps * (i / points) ** 2) for i in range(1, points + 1)}
    known: dict[int, float | None] = {}
    found = [(0, 0.0)]
    for n in sorted(asked):
        releases = releases_after(n)
        if releases not in known:
            known[releases] = epsilon_at(releases)
        value = known[releases]
        if value is not None and math.isfinite(value):
            found.append((n, value))
    return Curve(accountant=accountant, points=tuple(found) if len(found) > 1 else (), bound=accountant != "gdp")

"""A plan whose epsilon is known: its figures by every accountant, its curve, and the settings that run it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from tg_tinker.errors import InvalidRequestError
from tg_tinker.privacy.accounting import gate_epsilon, gdp_estimate, installed, pld_epsilon, prv_epsilon
from tg_tinker.privacy.curves import Curve, curve_of
from tg_tinker.privacy.plots import svg_chart
from tg_tinker.types import DPConfig

Sampling = Literal["poisson", "none", "max_participation"]
Unknown = Literal["noise_multiplier", "epsilon", "steps", "batch_size", "dataset_size"]
ACCOUNTANTS = {
    "rdp": "the gate: holds when plans change along the way",
    "prv": "for a schedule fixed in advance (accountant_type='prv')",
    "pld": "dp_accounting: the second opinion of reports",
    "gdp": "central limit: an estimate, NOT a bound",
}
_POINTS = {"rdp": 60, "prv": 8, "pld": 10, "gdp": 60}  # of a curve: PRV takes up to two seconds for one


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A plan whose epsilon is known. ``epsilon`` is what the whole of it spends, by ``accountant``, at ``delta``.

    Attributes:
        noise_multiplier: noise standard deviation over ``max_grad_norm``.
        epsilon: spent after the last step; at most ``target_epsilon`` where one was given.
        delta: the probability with which the promise may not hold.
        steps: noised steps.
        batch_size: expected privacy units in a step; ``None`` where it does not matter and was not given.
        dataset_size: privacy units; likewise.
        sampling: as in ``DPConfig``; "poisson" alone is amplified.
        participations: most steps any one unit takes part in; for "max_participation".
        accountant: by which the unknown was solved: "rdp", the gate, or "prv", for a schedule fixed in advance.
        solved: the name of the unknown.
        target_epsilon: the target that was given; ``None`` if epsilon was the unknown.
    """

    noise_multiplier: float
    epsilon: float
    delta: float
    steps: int
    batch_size: int | None
    dataset_size: int | None
    sampling: Sampling
    participations: int | None
    accountant: Literal["rdp", "prv"]
    solved: Unknown
    target_epsilon: float | None

    @property
    def sample_rate(self) -> float:
        """Probability that a unit takes part in a step, where that amplifies; else 1."""
        if self.sampling != "poisson" or self.batch_size is None or self.dataset_size is None:
            return 1.0
        return self.batch_size / self.dataset_size

    @property
    def releases(self) -> int:
        """How many releases one unit takes part in, at most: steps, or participations."""
        return self.steps if self.participations is None else self.participations

    def releases_after(self, steps: int) -> int:
        """The same after ``steps`` of its steps; where participations count, batches go through the data in order."""
        if self.participations is None:
            return steps
        if self.batch_size is None or self.dataset_size is None:
            return min(steps, self.participations)
        return min(passes(steps, self.batch_size, self.dataset_size), self.participations)

    @property
    def histogram(self) -> dict[tuple[float, float], int]:
        """The plan as a history: (noise_multiplier, sample_rate) to how often."""
        return {(self.noise_multiplier, self.sample_rate): self.releases}

    def epsilon_by(self, accountant: str) -> float | None:
        """Epsilon of the whole plan by "rdp", "prv", "pld" or "gdp" (an estimate); ``None`` if it cannot say.

        Raises:
            InvalidRequestError: no accountant has that name, or its package is not installed.
        """
        return epsilon_by_name(accountant, self.noise_multiplier, self.sample_rate, self.releases, self.delta)

    def curve(self, accountant: str = "rdp") -> Curve:
        """Epsilon over steps, from nothing to the whole plan, by one accountant; empty where it cannot say.

        Raises:
            InvalidRequestError: as :meth:`epsilon_by`.
        """
        at = partial(epsilon_by_name, accountant, self.noise_multiplier, self.sample_rate, delta=self.delta)
        return curve_of(accountant, self.steps, self.releases_after, at, points=_POINTS.get(accountant, 1))

    def dp_config(self, **settings: Any) -> DPConfig:
        """A ``DPConfig`` that runs this plan; pass ``dataset_id`` and whatever else the plan does not decide.

        Its batch size belongs in ``TrainingConfig(batch_size=plan.batch_size, max_steps=plan.steps)``.
        """
        values: dict[str, Any] = {
            "noise_multiplier": self.noise_multiplier,
            "target_epsilon": self.epsilon if self.target_epsilon is None else self.target_epsilon,
            "target_delta": self.delta,
            "accountant_type": self.accountant,
            "sampling": self.sampling,
            "dataset_size": self.dataset_size,
        }
        if self.sampling == "max_participation":
            values["max_participation"] = self.participations
        return DPConfig(**{**values, **settings})

    def svg(self) -> str:
        """Epsilon over steps by every accountant that can say, as one SVG document, for light and dark pages."""
        curves = [self.curve(name) for name in available()]
        return svg_chart([c for c in curves if c.points], target=self.target_epsilon, delta=self.delta)

    def to_json(self) -> dict[str, Any]:
        """Every figure as JSON-compatible values; accountants that cannot say are left out."""
        figures = {name: self.epsilon_by(name) for name in available()}
        return {
            "noise_multiplier": self.noise_multiplier,
            "epsilon": self.epsilon,
            "delta": self.delta,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "dataset_size": self.dataset_size,
            "sampling": self.sampling,
            "sample_rate": self.sample_rate,
            "participations": self.participations,
            "accountant": self.accountant,
            "solved": self.solved,
            "target_epsilon": self.target_epsilon,
            "epsilon_by": {
                name: {"epsilon": value, "bound": name != "gdp", "note": ACCOUNTANTS[name]}
                for name, value in figures.items()
                if value is not None
            },
        }


def available() -> list[str]:
    """The accountants whose packages are installed; "rdp" and "gdp" always are."""
    return [name for name in ACCOUNTANTS if installed(name)]


def epsilon_by_name(
    accountant: str, noise_multiplier: float, sample_rate: float, releases: int, delta: float
) -> float | None:
    """Epsilon of equal releases by "rdp", "prv", "pld" or "gdp"; ``None`` where the accountant cannot say.

    Raises:
        InvalidRequestError: no accountant has that name, or its package is not installed.
    """
    history = {(noise_multiplier, sample_rate): releases}
    match accountant:
        case "rdp":
            return gate_epsilon(history, delta)
        case "gdp":
            return gdp_estimate(history, delta)
        case "pld":
            found = pld_epsilon(history, delta)
        case "prv":
            found = prv_epsilon(noise_multiplier, sample_rate, releases, delta)
        case _:
            raise InvalidRequestError(
                f"there is no accountant {accountant!r}; there are {', '.join(ACCOUNTANTS)}",
                field="accountant",
                constraint=f"one of {', '.join(ACCOUNTANTS)}",
            )
    return found if math.isfinite(found) else None


def passes(steps: int, batch_size: int, dataset_size: int) -> int:
    """Steps that the busiest unit takes part in, when batches go through the data in order."""
    return -(-steps * batch_size // dataset_size)

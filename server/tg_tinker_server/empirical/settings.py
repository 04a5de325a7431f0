"""What an audit does, as one frozen value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tg_tinker.errors import InvalidRequestError

Mode = Literal["gradient", "input"]
MODELS = ("tiny-llama-2m", "bigram")


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditSettings:
    """Settings of the five instruments.

    Attributes:
        model: "tiny-llama-2m" on the torch engine, or "bigram" on the NumPy one.
        mode: canaries as gradients (strong) or as records (plain).
        canaries: m; each is in the data with probability 1/2.
        epsilon: the budget of the audited run, which the service turns into noise.
        delta: of the claim and of the bound. What it adds to a p-value, at most twice itself per canary, must leave
            room for an alarm.
        steps: of the audited run; its noise is calibrated to them.
        confidence: of the lower bound.
        bounds: two values of C, at which the noise is measured.
        noise_steps: steps of each of those runs, an even number of which half come after a ``load_state``.
        draws: batches that the server draws, an even number.
        false_alarm_rate: of all tests together on an honest service. The distinguisher has one half, the tests of
            the noise and of the draws share the other evenly (Bonferroni).
        seed: of canaries and coins, for repeatable tests; ``None`` takes them from the operating system. Noise has
            none.
    """

    model: str = "tiny-llama-2m"
    mode: Mode = "gradient"
    canaries: int = 1000
    epsilon: float = 4.0
    delta: float = 1e-6
    steps: int = 4
    confidence: float = 0.95
    bounds: tuple[float, float] = (0.5, 2.0)
    noise_steps: int = 16
    draws: int = 32
    false_alarm_rate: float = 1e-3
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, holds, constraint in (
            ("model", self.model in MODELS, f"one of: {', '.join(MODELS)}"),
            ("mode", self.mode in ("gradient", "input"), "gradient or input"),
            ("canaries", 10 <= self.canaries <= 5000, "10 to 5000"),
            ("epsilon", 0 < self.epsilon < 50, "above 0, below 50"),
            ("delta", 0 < self.delta < 1 / self.canaries, "above 0, below 1 / canaries"),
            ("steps", self.steps >= 1, "at least 1"),
            ("confidence", 0.5 < self.confidence < 1, "above 0.5, below 1"),
            ("noise_steps", self.noise_steps >= 2 and self.noise_steps % 2 == 0, "even, at least 2"),
            ("draws", self.draws >= 2 and self.draws % 2 == 0, "even, at least 2"),
            ("false_alarm_rate", 0 < self.false_alarm_rate < 0.5, "above 0, below 0.5"),
            ("seed", self.seed is None or self.seed >= 0, "0 or more"),
        ):
            if not holds:
                raise InvalidRequestError(
                    f"the audit's {name} is {getattr(self, name)!r}; it must be {constraint}",
                    field=name,
                    constraint=constraint,
                )

    @property
    def backend(self) -> Literal["torch", "bigram"]:
        """The engine that is audited."""
        return "bigram" if self.model == "bigram" else "torch"

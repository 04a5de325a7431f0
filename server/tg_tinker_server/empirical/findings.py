"""What an audit found, as values and as JSON (docs/how-empirical-audit-works.md describes the schema).

Real numbers stand in the JSON as decimal strings, so that every reader hashes the same document.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tg_tinker_server.dp.events import decimal
from tg_tinker_server.empirical.bounds import LowerBound

SCHEMA = "tg-tinker/empirical-audit/v1"
Instrument = Literal["neighbours", "noise", "draws", "distinguisher", "charges"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One measured quantity and whether it contradicts the claim.

    Attributes:
        instrument: which of the five measured it.
        name: what was measured, for people.
        figure: its value.
        threshold: for a probe, the largest figure that the claim allows; for a test, the smallest p-value that does.
        p_value: probability of so extreme a figure under the claim; ``None`` where no chance is involved.
        note: what the service answered, where it answered in words.
    """

    instrument: Instrument
    name: str
    figure: float
    threshold: float
    p_value: float | None = None
    note: str = ""

    @property
    def alarm(self) -> bool:
        """Whether the claim is contradicted. What is not a number contradicts it."""
        if self.p_value is None:
            return not self.figure <= self.threshold
        return not self.p_value >= self.threshold

    def to_json(self) -> dict[str, Any]:
        """As in the result's ``findings``."""
        return {
            "instrument": self.instrument,
            "name": self.name,
            "figure": decimal(self.figure),
            "threshold": decimal(self.threshold),
            "p_value": None if self.p_value is None else decimal(self.p_value),
            "alarm": self.alarm,
            "note": self.note,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What the ledger says about the audited run: the upper bound that the lower bound must not cross.

    Attributes:
        epsilon: spent by the run, at ``delta``, as the ledger charged it.
        noise_multiplier: of each of its ``steps`` releases.
        ledger_head: hash of the ledger's last entry, hex.
    """

    epsilon: float
    delta: float
    noise_multiplier: float
    steps: int
    dataset_id: str
    ledger_head: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditResult:
    """Everything one audit found.

    Attributes:
        mode: what the canaries were: records ("input") or gradients ("gradient").
        canaries: each in the data with probability 1/2; neighbours differ by adding or removing one.
        false_alarm_rate: probability that an honest service raises any alarm, at most.
        seed: ``None`` where coins and canaries came from the operating system.
        created: ISO 8601, UTC.
    """

    version: str
    created: str
    model: str
    parameters: int
    mode: str
    canaries: int
    seed: int | None
    claim: Claim
    bound: LowerBound
    power_of_one_count: float
    findings: tuple[Finding, ...]
    false_alarm_rate: float
    seconds: float

    @property
    def alarms(self) -> tuple[Finding, ...]:
        """The findings that contradict the claim."""
        return tuple(f for f in self.findings if f.alarm)

    def to_json(self) -> dict[str, Any]:
        """The document that reports embed."""
        return {
            "schema": SCHEMA,
            "version": self.version,
            "created": self.created,
            "model": self.model,
            "trainable_parameters": self.parameters,
            "mode": self.mode,
            "canaries": self.canaries,
            "inclusion_probability": "0.5",
            "neighbours": "add-or-remove-one",
            "seed": self.seed,
            "claimed": {
                "epsilon": decimal(self.claim.epsilon),
                "delta": decimal(self.claim.delta),
                "noise_multiplier": decimal(self.claim.noise_multiplier),
                "steps": self.claim.steps,
                "dataset_id": self.claim.dataset_id,
                "ledger_head": self.claim.ledger_head,
            },
            "lower_bound": {
                "epsilon": decimal(self.bound.epsilon),
                "confidence": decimal(self.bound.confidence),
                "p_value_of_claim": decimal(self.bound.p_value),
                "guesses": self.bound.best.guesses,
                "correct": self.bound.best.correct,
                "tried": [{"guesses": g.guesses, "correct": g.correct} for g in self.bound.tried],
                "most_provable": decimal(self.bound.power),
                "most_provable_with_one_count": decimal(self.power_of_one_count),
            },
            "findings": [f.to_json() for f in self.findings],
            "false_alarm_rate": decimal(self.false_alarm_rate),
            "alarm": bool(self.alarms),
            "seconds": decimal(round(self.seconds, 1)),
        }

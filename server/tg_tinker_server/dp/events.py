"""What a release was, as the ledger records it: one immutable value per mechanism.

Epsilon is a fold of these values and nothing else. A kind that is not known here is refused, never free.
Fields are added, never renamed or reused: every ledger ever written must still be readable.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

Voucher = Literal["server", "client"]
_DECIMAL: Final = re.compile(r"[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?")


def _check_noise(noise_multiplier: float) -> None:
    if not (math.isfinite(noise_multiplier) and noise_multiplier > 0):
        raise ValueError(f"noise_multiplier must be positive and finite, got {noise_multiplier}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gaussian:
    """A noised sum in which every unit may have taken part: no amplification is claimed.

    ``noise_multiplier`` is the noise standard deviation divided by the L2 sensitivity.
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        _check_noise(self.noise_multiplier)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledGaussian:
    """A noised sum over a Poisson sample: each unit was in it with probability ``sample_rate``, on its own.

    ``vouched_by`` names who drew the sample; amplification holds only as far as that party is believed.
    """

    noise_multiplier: float
    sample_rate: float
    vouched_by: Voucher

    def __post_init__(self) -> None:
        _check_noise(self.noise_multiplier)
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"sample_rate must lie in (0, 1], got {self.sample_rate}")
        if self.vouched_by not in ("server", "client"):
            raise ValueError(f"vouched_by must be 'server' or 'client', got {self.vouched_by!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParticipationGaussian:
    """A noised sum in a run whose units are counted: it costs what it adds to the largest count.

    ``releases`` is by how much this step raised the largest number of steps that any one unit took part in
    since the run began: 0 or 1 for one step. A whole run then costs a k-fold Gaussian, k that largest count.
    """

    noise_multiplier: float
    releases: int

    def __post_init__(self) -> None:
        _check_noise(self.noise_multiplier)
        if self.releases < 0:
            raise ValueError(f"releases must not be negative, got {self.releases}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Unnoised:
    """A step without noise: epsilon is infinite from then on."""


Event = Gaussian | SampledGaussian | ParticipationGaussian | Unnoised


def amplified(event: Event) -> bool:
    """Whether the event's cost rests on someone's word about how the batch was drawn."""
    return isinstance(event, SampledGaussian) and event.sample_rate < 1


def decimal(value: float) -> str:
    """The shortest decimal string that reads back as ``value``; how numbers stand in hashed documents."""
    return repr(float(value))


def event_to_json(event: Event) -> dict[str, Any]:
    """The event as a JSON object; real numbers are decimal strings, so that every reader hashes the same."""
    match event:
        case Gaussian():
            return {"kind": "gaussian", "noise_multiplier": decimal(event.noise_multiplier)}
        case SampledGaussian():
            return {
                "kind": "sampled_gaussian",
                "noise_multiplier": decimal(event.noise_multiplier),
                "sample_rate": decimal(event.sample_rate),
                "vouched_by": event.vouched_by,
            }
        case ParticipationGaussian():
            return {
                "kind": "participation_gaussian",
                "noise_multiplier": decimal(event.noise_multiplier),
                "releases": event.releases,
            }
        case Unnoised():
            return {"kind": "unnoised"}
    raise ValueError(f"not a privacy event: {type(event).__name__}")


def event_from_json(document: Mapping[str, Any]) -> Event:
    """Read what :func:`event_to_json` wrote.

    Raises:
        ValueError: an unknown kind, an unknown or missing field, or a number that is not a decimal string.
            The caller must refuse: an event that is not understood has no known cost.
    """
    fields = dict(document)
    kind = fields.pop("kind", None)
    match kind:
        case "gaussian":
            _expect(kind, fields, "noise_multiplier")
            return Gaussian(noise_multiplier=_number(fields["noise_multiplier"]))
        case "sampled_gaussian":
            _expect(kind, fields, "noise_multiplier", "sample_rate", "vouched_by")
            return SampledGaussian(
                noise_multiplier=_number(fields["noise_multiplier"]),
                sample_rate=_number(fields["sample_rate"]),
                vouched_by=fields["vouched_by"],
            )
        case "participation_gaussian":
            _expect(kind, fields, "noise_multiplier", "releases")
            releases = fields["releases"]
            if not isinstance(releases, int) or isinstance(releases, bool):
                raise ValueError(f"releases must be an integer, got {releases!r}")
            return ParticipationGaussian(noise_multiplier=_number(fields["noise_multiplier"]), releases=releases)
        case "unnoised":
            _expect(kind, fields)
            return Unnoised()
    raise ValueError(f"unknown event kind {kind!r}")


def _expect(kind: str, fields: Mapping[str, Any], *names: str) -> None:
    if set(fields) != set(names):
        raise ValueError(f"{kind} event has fields {sorted(fields)}, expected {sorted(names)}")


def _number(value: object) -> float:
    if not isinstance(value, str) or not _DECIMAL.fullmatch(value):
        raise ValueError(f"expected a decimal string, got {value!r}")
    return float(value)

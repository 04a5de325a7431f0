"""What one step released, as an entry of the ledger records it. An unknown kind has no price and is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

_DECIMAL: Final = re.compile(r"[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?")
_DIGITS: Final = 40  # of one number; the shortest spelling of a float64 has at most 24 characters
_FIELDS: Final[Mapping[str, frozenset[str]]] = {
    "gaussian": frozenset({"noise_multiplier"}),
    "sampled_gaussian": frozenset({"noise_multiplier", "sample_rate", "vouched_by"}),
    "participation_gaussian": frozenset({"noise_multiplier", "releases"}),
    "unnoised": frozenset(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """One release, as accountants count it.

    Attributes:
        kind: of the event in the ledger.
        noise_multiplier: noise stddev divided by sensitivity; 0 where there was no noise at all.
        sample_rate: Poisson inclusion probability; 1 where no amplification is claimed.
        times: how many Gaussian releases it counts as: 1, or 0 for a counted step that raised no largest count.
        vouched_by: who says that the batch was drawn so, "server" or "client"; empty where nothing is claimed.
    """

    kind: str
    noise_multiplier: float
    sample_rate: float = 1.0
    times: int = 1
    vouched_by: str = ""

    @classmethod
    def from_json(cls, event: Mapping[str, Any]) -> Release:
        """Read the event of a "charge" or the mechanism of an "open".

        Raises:
            ValueError, TypeError: it is no event that this version knows, in exactly its fields.
        """
        if not isinstance(event, Mapping):
            raise ValueError("its event is no object")
        fields = dict(event)
        kind = fields.pop("kind", None)
        if not isinstance(kind, str) or kind not in _FIELDS:
            raise ValueError(f"its event is of kind {kind!r}, which this version of tg-tinker does not know")
        if set(fields) != _FIELDS[kind]:
            raise ValueError(f"its event has the fields {sorted(fields)}, not {sorted(_FIELDS[kind])}")
        if kind == "unnoised":
            return cls(kind=kind, noise_multiplier=0.0)
        sigma = decimal_of(fields["noise_multiplier"], "noise_multiplier")
        if not (math.isfinite(sigma) and sigma > 0):
            raise ValueError(f"its noise multiplier is {sigma}")
        if kind == "participation_gaussian":
            times = count_of(fields["releases"], "releases")
            if times > 1:
                raise ValueError(f"it raises a count by {times}; one step can by 1 at most")
            return cls(kind=kind, noise_multiplier=sigma, times=times)
        if kind == "gaussian":
            return cls(kind=kind, noise_multiplier=sigma)
        rate, voucher = decimal_of(fields["sample_rate"], "sample_rate"), fields["vouched_by"]
        if not 0 < rate <= 1 or voucher not in ("server", "client"):
            raise ValueError(f"its sampling rate is {rate}, vouched for by {voucher!r}")
        return cls(kind=kind, noise_multiplier=sigma, sample_rate=rate, vouched_by=voucher)

    @property
    def amplified(self) -> bool:
        """Whether its price rests on somebody's word about how the batch was drawn."""
        return self.sample_rate < 1


def histogram(releases: Iterable[Release]) -> dict[tuple[float, float], int] | None:
    """How often each (noise multiplier, sampling rate) was released; ``None`` after an un-noised release."""
    counts: dict[tuple[float, float], int] = {}
    for release in releases:
        if release.noise_multiplier == 0.0:
            return None
        if release.times:
            key = release.noise_multiplier, release.sample_rate
            counts[key] = counts.get(key, 0) + release.times
    return counts


def decimal_of(value: object, name: str, *, infinite: bool = False) -> float:
    """A number that stands as a decimal string; "inf" only where it may.

    Raises:
        ValueError: it is none.
    """
    if infinite and value == "inf":
        return math.inf
    if not isinstance(value, str) or len(value) > _DIGITS or not _DECIMAL.fullmatch(value):
        raise ValueError(f"its {name} is no decimal string")
    number = float(value)
    if not math.isfinite(number):  # 1e999: infinity has one spelling, where it is allowed at all
        raise ValueError(f"its {name} is no finite number")
    return number


def count_of(value: object, name: str) -> int:
    """A count that stands as an integer.

    Raises:
        ValueError: it is none, or negative.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"its {name} is no count")
    return value


def text_of(value: object, name: str) -> str:
    """A text.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, str):
        raise ValueError(f"its {name} is no text")
    return value

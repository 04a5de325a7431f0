"""What masking rests on: who may take part, how many must stay, how numbers are rounded, and the place in a job."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from tg_tinker.errors import FederationRefusedError
from tg_tinker.federated.job import Job
from tg_tinker.federated.masking.ring import check_headroom

LEAST_SITES = 3
"""In a sum: of two each would learn the other's update from the sum and its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskingSetting:
    """The part of a job that masking needs.

    Attributes:
        job: digest of the job, hex.
        roster: each site's identity key, by name in sorted order; a site's place in it, from 1, is its Shamir point.
        rounds: of the job.
        threshold: sites that must stay, t: three or more, and more than half.
        clip: bound on a coordinate of an update.
        bits: of a rounded coordinate.
    """

    job: str
    roster: Mapping[str, Ed25519PublicKey]
    rounds: int
    threshold: int
    clip: float
    bits: int

    @classmethod
    def of(cls, job: Job) -> Self:
        """The setting of a job. Make it when a job is joined: it refuses what could not work later.

        Raises:
            FederationRefusedError: reason "masking": no masking in the job, a sum that could overflow, or a key twice
                on the roster; "too_few_sites": fewer than three sites.
        """
        if job.masking is None:
            raise FederationRefusedError("the job has no masking, so there is nothing to mask", reason="masking")
        count = len(job.roster)
        if count < LEAST_SITES:
            raise FederationRefusedError(
                f"masking needs at least {LEAST_SITES} sites and the roster has {count}: of two, each would learn "
                "the other's update from the sum; add sites or leave masking out",
                reason="too_few_sites",
            )
        if len(set(job.roster.values())) < count:
            raise FederationRefusedError(
                "two sites of the roster have the same public key, so one of them could speak for both; give each "
                "site a key of its own",
                reason="masking",
            )
        check_headroom(count, job.masking.bits)
        return cls(
            job=job.digest(),
            roster={name: _identity(name, job.roster[name]) for name in sorted(job.roster)},
            rounds=job.rounds,
            threshold=job.masking.threshold or max(LEAST_SITES, -(-2 * count // 3)),
            clip=job.masking.clip,
            bits=job.masking.bits,
        )

    @property
    def sites_in_league(self) -> int:
        """How many sites may be in league with the coordinator, and lie, while two honest updates or more are summed.

        Of n sites ``2 t - n - 1``, so that no two views of an attempt find t signers, and ``t - 2`` at most.
        """
        return min(2 * self.threshold - len(self.roster) - 1, self.threshold - 2)

    def point(self, site: str) -> int:
        """Where the site's Shamir shares are taken: its place on the sorted roster, from 1."""
        return list(self.roster).index(site) + 1

    def identity(self, site: str) -> Ed25519PublicKey:
        """The site's identity key.

        Raises:
            FederationRefusedError: reason "unknown_site".
        """
        if site not in self.roster:
            raise FederationRefusedError(f"site {site[:80]!r} is not on the roster of the job", reason="unknown_site")
        return self.roster[site]

    def require(self, count: int, what: str) -> None:
        """Require ``count`` to reach the threshold.

        Raises:
            FederationRefusedError: reason "too_few_sites".
        """
        if count < self.threshold:
            raise FederationRefusedError(
                f"{count} sites {what}, and masking needs {self.threshold} of {len(self.roster)}; look at the sites "
                "that did not, then try the round again",
                reason="too_few_sites",
            )


@dataclass(frozen=True, slots=True)
class Place:
    """One attempt at one round of one job. Everything that is signed, derived or sealed is bound to it."""

    job: str
    round: int
    attempt: int

    def bind(self, domain: str, **fields: Any) -> bytes:
        """Bytes that stand for the domain, the place and the fields, and for nothing else: a tag, then JCS."""
        return (
            domain.encode()
            + b"\x00"
            + rfc8785.dumps({"attempt": self.attempt, "job": self.job, "round": self.round, **fields})
        )

    def __str__(self) -> str:
        return f"round {self.round}, attempt {self.attempt}"


def _identity(site: str, text: str) -> Ed25519PublicKey:
    raw = base64.b64decode(text)
    if base64.b64encode(raw).decode() != text:
        raise FederationRefusedError(
            f"the public key of site {site!r} on the roster is not in the canonical form of base64", reason="masking"
        )
    return Ed25519PublicKey.from_public_bytes(raw)

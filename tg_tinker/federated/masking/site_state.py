"""What a site remembers between the steps of masking, as JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from tg_tinker.federated.masking.keys import SECRET_BYTES
from tg_tinker.federated.masking.shamir import SHARE_BYTES
from tg_tinker.transparency._encoding import from_base64

REMEMBERED_KEYS = 5_000
"""Keys of earlier attempts that are known again: some 30 rounds of 50 sites, 500 of three."""
REMEMBERED_BASES = 1_000
"""Weights of earlier rounds that are known again."""


def _holds(size: int) -> AfterValidator:
    def check(value: str) -> str:
        if len(from_base64(value)) != size:
            raise ValueError(f"not base64 of {size} bytes")
        return value

    return AfterValidator(check)


def set_digest(sites: Iterable[str]) -> str:
    """SHA-256 of a set of sites, hex."""
    return hashlib.sha256(json.dumps(sorted(sites)).encode()).hexdigest()


class MaskingState(BaseModel):
    """State of one site in one job.

    ``secret`` and ``received`` are secret: whoever has them and what the coordinator holds has the site's update.
    They go when shares are opened, or when a later attempt begins.

    Attributes:
        round: the attempt that all below belongs to; 0 before the first.
        base: digest of the weights that its update is trained from, hex.
        secret: 32 bytes that its keys and shares follow from, base64.
        keys: by site, as in the request for shares.
        received: by site, its shares for this one, base64; its own are derived.
        masked: SHA-256 of the rounded update; no other is masked with the same masks.
        stayed: the set this site signed.
        opened: its reply when it opened shares.
        opened_round: the round it last opened shares in, whichever the attempt,
        opened_stayed: and for which set. The sum over another set of the same round would differ by single updates.
        opened_bases: digest of the set that shares were opened for, by base, in whichever round; the latest last. Two
            rounds that begin with the same weights are two sums of nearly the same updates.
        earlier_keys: keys and commitments of other attempts, the latest last, base64.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    format: Literal["tg-tinker/masking-state/v1"] = "tg-tinker/masking-state/v1"
    job: str
    site: str
    round: int = 0
    attempt: int = 0
    secret: Annotated[str, _holds(SECRET_BYTES)] | None = Field(default=None, repr=False)
    base: str | None = None
    keys: dict[str, dict[str, str]] | None = None
    received: dict[str, Annotated[str, _holds(2 * SHARE_BYTES)]] | None = Field(default=None, repr=False)
    masked: str | None = Field(default=None, repr=False)
    stayed: list[str] | None = None
    opened: dict[str, Any] | None = None
    opened_round: int = 0
    opened_stayed: list[str] | None = None
    opened_bases: dict[str, str] = Field(default_factory=dict)
    earlier_keys: list[str] = Field(default_factory=list)

    def begin(self, round_: int, attempt: int, *, base: str, secret: str) -> None:
        """Forget the attempt before, remember its keys, start another."""
        self.forget()
        self.round, self.attempt, self.base, self.secret = round_, attempt, base, secret

    def forget(self) -> None:
        """Drop every secret and everything else of the attempt, but what later ones must know."""
        used = [ad[name] for ad in (self.keys or {}).values() for name in ("mask_key", "share_key", "commitment")]
        self.earlier_keys = [*self.earlier_keys, *used][-REMEMBERED_KEYS:]
        self.keys = self.received = self.stayed = self.opened = None
        self.secret = self.masked = self.base = None

    def close(self, reply: dict[str, Any], stayed: list[str]) -> None:
        """Shares were opened: what is secret is of no more use."""
        assert self.base is not None
        self.opened, self.opened_round, self.opened_stayed = reply, self.round, stayed
        others = {base: of for base, of in self.opened_bases.items() if base != self.base}
        self.opened_bases = dict([*others.items(), (self.base, set_digest(stayed))][-REMEMBERED_BASES:])
        self.secret = self.received = self.masked = None

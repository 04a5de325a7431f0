"""The seam between our rounds and whatever carries their messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tg_tinker.federated.messages import Envelope

Handler = Callable[[Envelope], Envelope]
"""What a site does with a request. It answers a refusal as a reply too, so that it is signed; it raises nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one request.

    Attributes:
        reply: ``None`` if none came in time, or the carrier failed.
        failure: why there is none, for people; empty otherwise.
    """

    site: str
    reply: Envelope | None
    failure: str = ""


class CoordinatorLink(Protocol):
    """Sends requests to sites and collects their replies. It vouches for nothing: signatures are checked above."""

    def sites(self) -> Sequence[str]:
        """Names of the sites that can be reached now."""
        ...

    def exchange(self, requests: Sequence[Envelope], *, timeout_s: float) -> list[Outcome]:
        """Send all, wait for all or for the deadline; one outcome for each request, in its order.

        A reply that comes after the deadline is dropped.
        """
        ...

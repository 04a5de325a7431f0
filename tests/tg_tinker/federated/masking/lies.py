"""A coordinator whose every request the tests choose."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from tests.tg_tinker.federated.masking.parties import Federation, base_of
from tg_tinker.errors import FederationRefusedError
from tg_tinker.federated.masking import MaskingRound


class Lies:
    """Four sites (three must stay), asked one by one."""

    def __init__(self, count: int = 4) -> None:
        self.federation = Federation.of(count)
        self.updates = self.federation.updates(6)
        self.names = sorted(self.updates)

    def ask(self, step: str, site: str, request: Any = None, *, attempt: int = 0, round_: int = 1) -> Any:
        return self.federation.call(step, site, round_, attempt, request, self.updates[site])

    def keys(self, *, attempt: int = 0, round_: int = 1) -> dict[str, Any]:
        request = {"base": base_of(round_)}
        return {site: self.ask("keys", site, request, attempt=attempt, round_=round_) for site in self.names}

    def inboxes(self, replies: dict[str, Any], senders: list[str]) -> dict[str, Any]:
        """Requests to train, with shares of the senders alone."""
        return {
            site: {"shares": {peer: replies[peer]["shares"][site] for peer in senders if peer != site}}
            for site in replies
        }

    def until_masked(self) -> tuple[MaskingRound, dict[str, Any]]:
        """An honest attempt up to the masked updates of all."""
        round_ = MaskingRound(self.federation.job, 1, 0, size=6, base=base_of(1))
        request = round_.keys(self.keys())
        requests = round_.shares({site: self.ask("shares", site, request) for site in self.names})
        return round_, {site: self.ask("train", site, requests[site]) for site in self.names}


def refused(reason: str, match: str) -> Any:
    """The refusal that is expected, for this reason."""
    return pytest.raises(FederationRefusedError, match=match, check=lambda error: error.reason == reason)


def to_open(sites: list[str], dropped: list[str], signatures: dict[str, Any]) -> dict[str, Any]:
    """A request to open."""
    return {
        "stayed": sites,
        "dropped": dropped,
        "signatures": {site: reply["signature"] for site, reply in signatures.items()},
    }


def bytes_of(text: str) -> bytes:
    """Base64 undone."""
    return base64.b64decode(text)


def text_of(data: bytes) -> str:
    """Base64."""
    return base64.b64encode(data).decode()

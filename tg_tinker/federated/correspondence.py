"""The coordinator's letters: signed requests, and replies that count only if the right site signed them in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tg_tinker.errors import FederationRefusedError
from tg_tinker.federated.job import Job
from tg_tinker.federated.keys import public_key
from tg_tinker.federated.link import CoordinatorLink, Outcome
from tg_tinker.federated.messages import Arrays, Envelope
from tg_tinker.federated.rounds import Answer

FAILED = "failed"
"""Reason of a reply that is no refusal: something broke at the site, and asking again may help."""
_PLACE = ("kind", "job", "site", "round", "attempt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """What one site said to one request.

    Attributes:
        reply: verified, and no refusal; ``None`` otherwise.
        answer: what to note instead of a reply.
    """

    reply: Envelope | None
    answer: Answer


class Correspondence:
    """Asks the sites of one job."""

    def __init__(self, job: Job, key: Ed25519PrivateKey) -> None:
        self._digest, self._key = job.digest(), key
        self._keys = {site: public_key(text) for site, text in job.roster.items()}

    def ask(
        self,
        link: CoordinatorLink,
        sites: Iterable[str],
        kind: str,
        *,
        timeout_s: float,
        place: tuple[int, int] = (0, 0),
        facts: Mapping[str, Any] | Mapping[str, Mapping[str, Any]] | None = None,
        each: bool = False,
        arrays: Arrays | None = None,
    ) -> dict[str, Word]:
        """Ask sites for one thing; one word of each, in order of their names.

        Args:
            place: round and attempt.
            facts: of the request; by site if ``each``.
            arrays: the same for all.
        """
        requests = []
        reachable = set(link.sites())
        asked = sorted(set(sites))
        for site in asked:
            if site in reachable:
                own: Mapping[str, Any] = (facts or {}).get(site, {}) if each else (facts or {})
                requests.append(
                    Envelope(
                        kind=kind,
                        direction="request",
                        job=self._digest,
                        site=site,
                        round=place[0],
                        attempt=place[1],
                        facts=dict(own),
                        arrays=arrays or {},
                    ).signed(self._key)
                )
        words = {site: Word(reply=None, answer=Answer.none("not connected")) for site in asked}
        if requests:
            outcomes = link.exchange(requests, timeout_s=timeout_s)
            for request, outcome in zip(requests, outcomes, strict=True):
                words[request.site] = self._read(request, outcome)
        return words

    def _read(self, request: Envelope, outcome: Outcome) -> Word:
        reply = outcome.reply
        if reply is None:
            return Word(reply=None, answer=Answer.none(outcome.failure or "no reply in time"))
        try:
            reply.verify(self._keys[request.site])
        except FederationRefusedError as e:
            return Word(reply=None, answer=Answer(kind="no_answer", reason=e.reason, message=e.message[:300]))
        except (ValueError, TypeError, AttributeError, RecursionError):  # what cannot be read cannot be signed
            return Word(reply=None, answer=Answer.none("its reply cannot be read"))
        if reply.direction != "reply" or any(getattr(reply, f) != getattr(request, f) for f in _PLACE):
            return Word(reply=None, answer=Answer.none("its reply answers another request"))
        return _said(reply)


def _said(reply: Envelope) -> Word:
    refused, message = reply.facts.get("refused"), reply.facts.get("message", "")
    if refused is None:
        return Word(reply=reply, answer=Answer(kind="update"))
    return Word(reply=None, answer=Answer.none(message) if refused == FAILED else Answer.refused(refused, message))

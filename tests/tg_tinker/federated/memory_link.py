"""A link in memory: requests go straight to the sites' handlers, through whatever a test wants to go wrong.

Messages are copied on their way and their arrays arrive read-only, as over a wire.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from tg_tinker.federated.link import Handler, Outcome
from tg_tinker.federated.messages import Envelope

Fault = str
"""What befalls one exchange with a site:

    "lose the request"   the site never sees it
    "lose the reply"     the site does the work, and nobody hears of it
    "repeat"             the site gets it twice; the second reply arrives
    "late"               the reply comes after the deadline, and is handed out instead of the next one
    "alter"              the carrier changes what is in the reply
    "die"                the site breaks down while it works: no reply
"""


class MemoryLink:
    """Handlers by the sites' names.

    Attributes:
        down: sites that are not connected.
        faults: what goes wrong next, by (site, kind), in order; "" is nothing.
        seen: every request that was sent.
        received: every reply that arrived at the coordinator.
        before: called with each request before a site gets it; may raise, as when the coordinator is killed.
    """

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        self.handlers = dict(handlers)
        self.down: set[str] = set()
        self.faults: dict[tuple[str, str], list[Fault]] = defaultdict(list)
        self.seen: list[Envelope] = []
        self.received: list[Envelope] = []
        self.before: Callable[[Envelope], None] = lambda _: None
        self._late: dict[str, Envelope] = {}

    def sites(self) -> Sequence[str]:
        return [site for site in self.handlers if site not in self.down]

    def exchange(self, requests: Sequence[Envelope], *, timeout_s: float) -> list[Outcome]:
        assert timeout_s > 0
        return [self._one(request) for request in requests]

    def count(self, kind: str, site: str | None = None) -> int:
        """Requests of a kind that were sent."""
        return sum(r.kind == kind and site in (None, r.site) for r in self.seen)

    def _one(self, request: Envelope) -> Outcome:
        site = request.site
        self.seen.append(request)
        self.before(request)
        faults = self.faults[site, request.kind]
        fault = faults.pop(0) if faults else ""
        if site in self.down or fault == "lose the request":
            return Outcome(site=site, reply=None, failure="no reply in time")
        if fault == "die":
            return Outcome(site=site, reply=None, failure="its app crashed")
        reply = _carried(self.handlers[site](_carried(request)))
        if fault == "repeat":
            reply = _carried(self.handlers[site](_carried(request)))
        if fault == "lose the reply":
            return Outcome(site=site, reply=None, failure="no reply in time")
        if fault == "late":
            self._late[site] = reply
            return Outcome(site=site, reply=None, failure="no reply in time")
        if fault == "alter":
            reply = replace(reply, facts={**reply.facts, "altered": True})
        reply = self._late.pop(site, reply)
        self.received.append(reply)
        return Outcome(site=site, reply=reply)


def _carried(envelope: Envelope) -> Envelope:
    arrays = {}
    for name, value in envelope.arrays.items():
        arrays[name] = np.frombuffer(value.tobytes(), value.dtype).reshape(value.shape)
    return replace(envelope, arrays=arrays)

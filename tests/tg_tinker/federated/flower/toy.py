"""A site without a server: it says who it is and answers "train" with the negated arrays."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field, replace

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tg_tinker.federated import hello
from tg_tinker.federated.keys import public_text
from tg_tinker.federated.messages import Envelope


@dataclass
class ToySite:
    """A handler. Does not answer whom it was not told about, like a real one."""

    name: str
    coordinator: Ed25519PublicKey
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    slow_s: float = 0.0
    seen: list[Envelope] = field(default_factory=list)
    at_work: int = 0
    most_at_work: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def public(self) -> str:
        """Its line of the roster."""
        return public_text(self.key)

    def __call__(self, request: Envelope) -> Envelope:
        """Answer a request."""
        if request.kind == hello.HELLO:
            return hello.answer(request, site=self.name, key=self.key, coordinator=self.coordinator)
        request.verify(self.coordinator)
        if request.kind == "crash":
            raise ValueError("secret text of a record")
        if request.kind == "elsewhere":
            return replace(request.reply(), round=request.round + 1).signed(self.key)
        with self.lock:
            self.seen.append(request)
            self.at_work += 1
            self.most_at_work = max(self.most_at_work, self.at_work)
        time.sleep(self.slow_s)
        with self.lock:
            self.at_work -= 1
        return request.reply(
            facts={"site": self.name}, arrays={name: np.negative(w) for name, w in request.arrays.items()}
        ).signed(self.key)


def train(site: str, key: Ed25519PrivateKey, *, round_: int = 1, kind: str = "train", value: float = 1.0) -> Envelope:
    """A signed request."""
    arrays = {"w": np.full(3, value, "<f4")}
    return Envelope(kind=kind, direction="request", job="ab" * 32, site=site, round=round_, arrays=arrays).signed(key)

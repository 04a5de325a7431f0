"""What travels between coordinator and sites: a kind, a place in the job, a few facts, arrays, a signature.

Whoever carries a message (a SuperLink, a proxy) can read it and cannot alter it, make one up, or move it to another
job, round or site: the signature is over all of it, by a key that the receiver was given beforehand.

Shape suffixes: P parameters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import rfc8785
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tg_tinker.errors import FederationRefusedError

COORDINATOR = "coordinator"
Arrays = Mapping[str, npt.NDArray[Any]]
Direction = Literal["request", "reply"]
_DOMAIN = b"tg-tinker/federated-message/v1\x00"
DTYPES = ("<f4", "<f8", "<u4", "<u8", "<i8", "|u1")
"""Types of arrays that are sent."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Envelope:
    """One message.

    Attributes:
        kind: what is asked or answered: "join", "train", "finish", and the steps of masking.
        direction: a request of the coordinator, or a site's reply to it.
        job: digest of the job, hex.
        site: name of the site that it goes to or comes from.
        round: from 1; 0 outside of rounds.
        attempt: counts repetitions of a round.
        facts: JSON-compatible; nothing private.
        arrays: by name; little-endian.
        signature: Ed25519 over `signed_bytes`.
    """

    kind: str
    direction: Direction
    job: str
    site: str
    round: int = 0
    attempt: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
    arrays: Arrays = field(default_factory=dict)
    signature: bytes = b""

    def signed_bytes(self) -> bytes:
        """What the signature is over: a domain tag, the header in JCS, the digest of each array."""
        return _DOMAIN + rfc8785.dumps(
            {
                "arrays": {name: array_digest(value) for name, value in self.arrays.items()},
                "attempt": self.attempt,
                "direction": self.direction,
                "facts": dict(self.facts),
                "job": self.job,
                "kind": self.kind,
                "round": self.round,
                "site": self.site,
            }
        )

    def digest(self) -> str:
        """SHA-256 of `signed_bytes`, hex: equal for equal messages."""
        return hashlib.sha256(self.signed_bytes()).hexdigest()

    def signed(self, key: Ed25519PrivateKey) -> Envelope:
        """The message with this key's signature."""
        return replace(self, signature=key.sign(self.signed_bytes()))

    def verify(self, key: Ed25519PublicKey) -> None:
        """Require this key's signature.

        Raises:
            FederationRefusedError: reason "bad_signature".
        """
        try:
            key.verify(self.signature, self.signed_bytes())
        except InvalidSignature:
            raise FederationRefusedError(
                f"the {self.direction} {self.kind!r} of site {self.site!r} is not signed by the key that was agreed "
                "on, or was altered on its way; compare the public keys in both configurations",
                reason="bad_signature",
            ) from None

    def reply(self, *, facts: Mapping[str, Any] | None = None, arrays: Arrays | None = None) -> Envelope:
        """An unsigned answer to this request, at the same place of the same job."""
        return replace(self, direction="reply", facts=dict(facts or {}), arrays=dict(arrays or {}), signature=b"")


def array_digest(value: npt.NDArray[Any]) -> str:
    """SHA-256 over dtype, shape and little-endian bytes, hex."""
    little = np.asarray(value, dtype=value.dtype.newbyteorder("<"), order="C")
    if little.dtype.str not in DTYPES:
        raise FederationRefusedError(f"arrays of type {value.dtype} are not sent", reason="bad_update")
    head = rfc8785.dumps({"dtype": little.dtype.str, "shape": list(little.shape)})
    return hashlib.sha256(head + b"\x00" + little.tobytes()).hexdigest()

"""Who is at the other end: a carrier knows nodes by numbers; a site proves its name by signing a fresh nonce."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tg_tinker.errors import FederationRefusedError
from tg_tinker.federated.keys import public_key
from tg_tinker.federated.messages import Envelope

HELLO = "hello"
"""Kind of the message. Its request names no job and no site."""


def ask(key: Ed25519PrivateKey) -> Envelope:
    """The coordinator's question with a nonce of 256 bits, signed."""
    nonce = secrets.token_hex(32)
    return Envelope(kind=HELLO, direction="request", job="", site="", facts={"nonce": nonce}).signed(key)


def answer(request: Envelope, *, site: str, key: Ed25519PrivateKey, coordinator: Ed25519PublicKey) -> Envelope:
    """A site's answer: its name and the nonce, signed.

    Only the agreed coordinator gets one: anybody else learns no name and no signature.

    Raises:
        FederationRefusedError: reason "bad_signature".
    """
    request.verify(coordinator)
    if request.kind != HELLO or request.direction != "request" or set(request.facts) != {"nonce"} or request.arrays:
        raise FederationRefusedError("this is no hello", reason="bad_signature")
    return replace(request.reply(facts={"nonce": request.facts["nonce"]}), site=site).signed(key)


def recognise(reply: Envelope, request: Envelope, *, roster: Mapping[str, str]) -> str:
    """The name of the site that answered.

    Args:
        roster: each site's public key (`Job.roster`).

    Raises:
        FederationRefusedError: "unknown_site": the name is not on the roster; "bad_signature": its key did not sign
            this answer, or it answers another question.
    """
    text = roster.get(reply.site)
    if text is None:
        raise FederationRefusedError(
            f"a node says that it is {reply.site[:80]!r}, which is not on the roster; add its public key to the job, "
            "or disconnect it",
            reason="unknown_site",
        )
    reply.verify(public_key(text))
    if reply.kind != HELLO or reply.direction != "reply" or reply.facts != {"nonce": request.facts["nonce"]}:
        raise FederationRefusedError(
            f"the hello of site {reply.site!r} answers another question: it was sent again by somebody",
            reason="bad_signature",
        )
    return reply.site

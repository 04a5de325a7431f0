"""DSSE envelopes: a signature over any document together with its type.

DSSE v1.0.2 (github.com/secure-systems-lab/dsse) with Ed25519. The key id is the C2SP key hash of the log's
verifier key, in hex; unlike plain DSSE we require it, so that every bit of an envelope counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tg_tinker.errors import LogVerificationError
from tg_tinker.transparency._encoding import from_base64, to_base64
from tg_tinker.transparency.note import Sign, VerifierKey

_FIELDS = {"payloadType", "payload", "signatures"}
_SIGNATURE_FIELDS = {"keyid", "sig"}


def pae(payload_type: str, payload: bytes) -> bytes:
    """The bytes that are signed: DSSE's pre-authentication encoding."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def sign_envelope(payload_type: str, payload: bytes, key: VerifierKey, sign: Sign) -> dict[str, Any]:
    """The envelope as a JSON object.

    Args:
        sign: the private half of ``key``.
    """
    signature = {"keyid": key.key_hash.hex(), "sig": to_base64(sign(pae(payload_type, payload)))}
    return {"payloadType": payload_type, "payload": to_base64(payload), "signatures": [signature]}


def open_envelope(envelope: Mapping[str, Any], key: VerifierKey, *, payload_type: str) -> bytes:
    """The payload of an envelope that ``key`` signed as ``payload_type``. Signatures of other keys are passed over.

    Raises:
        LogVerificationError: kind ``"bad_signature"``: not an envelope, of another type, not signed by this key, or
            altered.
    """
    payload, signatures = _read(envelope)
    if envelope["payloadType"] != payload_type:
        raise _bad(f"the document is of type {str(envelope['payloadType'])[:100]!r}, not {payload_type!r}")
    ours = [s for keyid, s in signatures if keyid == key.key_hash.hex()]
    if not ours:
        raise _bad(f"the document has no signature of {key.name} ({key.key_hash.hex()})")
    if not all(key.is_signed(pae(payload_type, payload), s) for s in ours):
        raise _bad(f"the signature of {key.name} is not over this document: it was altered")
    return payload


def _read(envelope: Mapping[str, Any]) -> tuple[bytes, list[tuple[str, bytes]]]:
    try:
        shaped = set(envelope) == _FIELDS and all(set(s) == _SIGNATURE_FIELDS for s in envelope["signatures"])
        payload = from_base64(envelope["payload"])
        signatures = [(str(s["keyid"]), from_base64(s["sig"])) for s in envelope["signatures"]]
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise _bad("this is not a DSSE envelope") from e
    if not shaped:
        raise _bad("this is not a DSSE envelope: it lacks a field or has one too many")
    return payload, signatures


def _bad(message: str) -> LogVerificationError:
    return LogVerificationError(message, kind="bad_signature")

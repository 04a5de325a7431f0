"""Envelopes: the payload that was signed under its type, or an error."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tg_tinker.errors import LogVerificationError
from tg_tinker.transparency.dsse import open_envelope, pae, sign_envelope
from tg_tinker.transparency.note import VerifierKey

PRIVATE = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
KEY = VerifierKey.of(PRIVATE.public_key().public_bytes_raw())
TYPE = "application/vnd.tg-tinker.report+json"
PAYLOAD = b'{"epsilon":"1.5"}'
ENVELOPE = sign_envelope(TYPE, PAYLOAD, KEY, PRIVATE.sign)


def refused() -> pytest.RaisesExc[LogVerificationError]:
    return pytest.RaisesExc(LogVerificationError, check=lambda e: e.kind == "bad_signature")


def test_the_payload_comes_back() -> None:
    assert open_envelope(json.loads(json.dumps(ENVELOPE)), KEY, payload_type=TYPE) == PAYLOAD
    assert ENVELOPE["signatures"][0]["keyid"] == KEY.key_hash.hex()
    assert open_envelope(sign_envelope(TYPE, b"", KEY, PRIVATE.sign), KEY, payload_type=TYPE) == b""


def test_the_type_is_signed_with_its_length_in_bytes() -> None:
    assert pae("é", b"x") == b"DSSEv1 2 \xc3\xa9 1 x"
    assert pae("a 1 b", b"") != pae("a", b"b 0 ")


def test_every_flipped_bit_is_refused() -> None:
    data = json.dumps(ENVELOPE, separators=(",", ":")).encode()
    for i in range(len(data) * 8):
        changed = bytearray(data)
        changed[i // 8] ^= 1 << i % 8
        try:
            value = json.loads(changed)
        except ValueError:
            continue  # no JSON any more
        with refused():
            open_envelope(value, KEY, payload_type=TYPE)


def test_a_good_signature_of_another_type_or_key_is_refused() -> None:
    other = Ed25519PrivateKey.from_private_bytes(bytes(32))
    other_key = VerifierKey.of(other.public_key().public_bytes_raw())
    with refused():
        open_envelope(ENVELOPE, KEY, payload_type="application/json")
    with refused():
        open_envelope({**ENVELOPE, "payloadType": "application/json"}, KEY, payload_type="application/json")
    with refused():
        open_envelope(ENVELOPE, other_key, payload_type=TYPE)
    with refused():
        open_envelope(sign_envelope(TYPE, PAYLOAD, KEY, other.sign), KEY, payload_type=TYPE)


def test_a_second_signature_is_passed_over_unless_it_is_ours_and_false() -> None:
    other = Ed25519PrivateKey.from_private_bytes(bytes(32))
    other_key = VerifierKey.of(other.public_key().public_bytes_raw())
    theirs = sign_envelope(TYPE, PAYLOAD, other_key, other.sign)["signatures"]
    assert (
        open_envelope({**ENVELOPE, "signatures": theirs + ENVELOPE["signatures"]}, KEY, payload_type=TYPE) == PAYLOAD
    )
    false = sign_envelope(TYPE, b"else", KEY, PRIVATE.sign)["signatures"]
    with refused():
        open_envelope({**ENVELOPE, "signatures": ENVELOPE["signatures"] + false}, KEY, payload_type=TYPE)


@pytest.mark.parametrize(
    "changed",
    [
        {"payload": None},
        {"payload": "Zm9v\n"},
        {"payload": "Zm9"},
        {"signatures": []},
        {"signatures": None},
        {"signatures": ["x"]},
        {"signatures": {"keyid": "x"}},
        {"signatures": [{**ENVELOPE["signatures"][0], "more": 1}]},
        {"signatures": [{"keyid": KEY.key_hash.hex(), "sig": 7}]},
        {"more": 1},
        {"payloadType": ["a"]},
    ],
)
def test_what_is_no_envelope_is_refused(changed: dict[str, Any]) -> None:
    with refused():
        open_envelope({**ENVELOPE, **changed}, KEY, payload_type=TYPE)
    for envelope in ({}, [], "x", None, 7):
        with refused():
            open_envelope(envelope, KEY, payload_type=TYPE)  # type: ignore[arg-type]

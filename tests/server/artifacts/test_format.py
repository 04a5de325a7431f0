"""A header is read only if it is, byte for byte, what its writer wrote."""

from __future__ import annotations

import dataclasses
import json

import pytest
import rfc8785

from tg_tinker_server.artifacts.format import (
    LARGEST_HEADER_BYTES,
    PREFIX_BYTES,
    DataKeys,
    Header,
    Scope,
    header_bytes,
    parse_header,
    parse_slots,
    slots_bytes,
)
from tg_tinker_server.artifacts.tensors import FormatError
from tg_tinker_server.crypto.envelope import WrappedKey

SCOPE = Scope(tenant="acme", artifact_id="ck_01234567", kind="checkpoint")
KEYS = DataKeys.derive(b"d" * 32, SCOPE)
SLOTS = (WrappedKey(key_id="tenant-kek/acme/v1", wrapped=b"w" * 60),)
HEADER = Header(scope=SCOPE, commitment=KEYS.commitment, slots=SLOTS)


def framed(text: bytes) -> bytes:
    return b"TGTINKER" + (1).to_bytes(2, "big") + len(text).to_bytes(4, "big") + text + bytes(32)


def changed(**fields: object) -> bytes:
    start = header_bytes(HEADER, KEYS)
    value = json.loads(start[PREFIX_BYTES:-32])
    return framed(rfc8785.dumps({**value, **fields}))  # type: ignore[dict-item]


def test_a_header_reads_back_and_its_tag_holds_for_its_keys_only() -> None:
    start = header_bytes(HEADER, KEYS)
    header, read = parse_header(start + b"the body")
    assert header == HEADER
    assert read.size == len(start)
    assert read.has_tag_of(KEYS)
    assert not read.has_tag_of(DataKeys.derive(b"e" * 32, SCOPE))


def test_slots_read_back_and_nothing_may_follow_them() -> None:
    blob = slots_bytes(SLOTS, KEYS)
    slots, read = parse_slots(blob)
    assert slots == SLOTS
    assert read.has_tag_of(KEYS)
    with pytest.raises(FormatError):
        parse_slots(blob + b"\0")


@pytest.mark.parametrize("field", ["tenant", "artifact_id", "kind"])
def test_keys_and_associated_data_differ_with_every_part_of_the_scope(field: str) -> None:
    other = dataclasses.replace(SCOPE, **{field: "other"})
    assert other.aad != SCOPE.aad
    keys = DataKeys.derive(b"d" * 32, other)
    assert len({keys.body, keys.tag, keys.commitment, KEYS.body, KEYS.tag, KEYS.commitment}) == 6


def test_every_changed_bit_is_a_format_error_or_breaks_the_tag_or_commitment() -> None:
    start = header_bytes(HEADER, KEYS)
    for bit in range(8 * len(start)):
        flipped = bytearray(start)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            _, read = parse_header(bytes(flipped))
        except FormatError:
            continue
        assert not read.has_tag_of(KEYS)


def test_every_truncation_is_a_format_error() -> None:
    start = header_bytes(HEADER, KEYS)
    for size in range(len(start)):
        with pytest.raises(FormatError):
            parse_header(start[:size])


@pytest.mark.parametrize("claim", [LARGEST_HEADER_BYTES + 1, 2**32 - 1])
def test_an_oversized_header_is_refused(claim: int) -> None:
    with pytest.raises(FormatError):
        parse_header(b"TGTINKER" + b"\0\1" + claim.to_bytes(4, "big") + bytes(2 * LARGEST_HEADER_BYTES))
    with pytest.raises(ValueError, match="over"):
        header_bytes(dataclasses.replace(HEADER, slots=SLOTS * 1000), KEYS)


@pytest.mark.parametrize(
    "start",
    [
        changed(algorithm="none"),
        changed(stream="AES128_CTR_HMAC"),
        changed(extra=1),
        changed(tenant=7),
        changed(slots=[]),
        changed(slots={}),
        changed(slots=[{"key_id": "x"}]),
        changed(slots=[{"key_id": "x", "wrapped": "not base64!"}]),
        changed(slots=[{"key_id": "x", "wrapped": "YR=="}]),  # decodes, but not the canonical spelling of "a"
        changed(commitment=None),
        framed(b"[]"),
        framed(b"{"),
        framed(b"\xff"),
        framed(b"[" * 60_000),
        framed(b" " + header_bytes(HEADER, KEYS)[PREFIX_BYTES:-32]),
        b"",
        b"TGTINKER",
        b"TGTSLOTS" + header_bytes(HEADER, KEYS)[8:],
        b"TGTINKER\0\2" + header_bytes(HEADER, KEYS)[10:],
    ],
)
def test_a_strange_header_is_refused(start: bytes) -> None:
    with pytest.raises(FormatError):
        parse_header(start)
    parse_header(changed())

"""Small values open under their own key and associated data only."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tg_tinker_server.crypto.aead import (
    DecryptionError,
    associated_data,
    derive_key,
    new_key,
    open_sealed,
    seal,
)

fields = st.lists(st.binary(max_size=6), max_size=4)


@given(one=fields, two=fields)
def test_different_fields_give_different_associated_data(one: list[bytes], two: list[bytes]) -> None:
    assert (associated_data("d", *one) == associated_data("d", *two)) == (one == two)


def test_moving_a_byte_between_fields_or_into_the_domain_changes_the_associated_data() -> None:
    assert associated_data("d", "ab", "c") != associated_data("d", "a", "bc")
    assert associated_data("d", "a") != associated_data("da")
    assert associated_data("d", "") != associated_data("d")


@given(st.binary(max_size=100))
def test_what_was_sealed_opens(plain: bytes) -> None:
    key = new_key()
    assert open_sealed(key, seal(key, plain, b"a"), b"a") == plain


def test_every_changed_bit_and_every_truncation_is_refused() -> None:
    key = new_key()
    sealed = seal(key, b"value", b"a")
    for bit in range(8 * len(sealed)):
        changed = bytearray(sealed)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DecryptionError):
            open_sealed(key, bytes(changed), b"a")
    for size in range(len(sealed)):
        with pytest.raises(DecryptionError):
            open_sealed(key, sealed[:size], b"a")


def test_other_associated_data_and_another_key_are_refused() -> None:
    key = new_key()
    with pytest.raises(DecryptionError):
        open_sealed(key, seal(key, b"value", b"a"), b"b")
    with pytest.raises(DecryptionError):
        open_sealed(new_key(), seal(key, b"value", b"a"), b"a")


def test_derivation_is_hkdf_sha256() -> None:
    # RFC 5869, test case 1, whose 42 bytes begin with our 32.
    okm = derive_key(bytes([0x0B] * 22), bytes(range(0xF0, 0xFA)), salt=bytes(range(13)))
    assert okm.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"

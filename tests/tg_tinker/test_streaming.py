"""Our streams are Tink's streams, and nothing but the whole stream opens."""

from __future__ import annotations

import io
import os
import random
from collections import deque
from collections.abc import Iterator
from typing import cast

import pytest
import tink  # type: ignore[import-untyped]
from tink import secret_key_access, streaming_aead
from tink.proto import (  # type: ignore[import-untyped]
    aes_gcm_hkdf_streaming_pb2,
    common_pb2,
    tink_pb2,
)

from tests.support.work import peak_bytes
from tg_tinker.streaming import (
    HEADER_BYTES,
    SEGMENT_BYTES,
    TAG_BYTES,
    DecryptionError,
    ciphertext_size,
    decrypt_stream,
    encrypt_segments,
    encrypt_stream,
    plaintext_size,
)

FIRST = SEGMENT_BYTES - HEADER_BYTES - TAG_BYTES
FULL = SEGMENT_BYTES - TAG_BYTES
SIZES = [0, 1, 100, FIRST - 1, FIRST, FIRST + 1, FIRST + FULL, FIRST + FULL + 1, 3_000_000]
KEY = bytes(range(32))
AAD = b"tenant and id"


class Sink(io.BytesIO):
    """Keeps what was written when Tink closes it."""

    content = b""

    def close(self) -> None:
        if not self.closed:
            self.content = self.getvalue()
        super().close()


def stock_tink(key: bytes) -> streaming_aead.StreamingAead:
    """Tink's own AES256_GCM_HKDF_1MB over raw key material."""
    streaming_aead.register()
    params = aes_gcm_hkdf_streaming_pb2.AesGcmHkdfStreamingParams(
        ciphertext_segment_size=2**20, derived_key_size=32, hkdf_hash_type=common_pb2.SHA256
    )
    material = aes_gcm_hkdf_streaming_pb2.AesGcmHkdfStreamingKey(params=params, key_value=key)
    keyset = tink_pb2.Keyset(primary_key_id=1)
    entry = keyset.key.add()
    entry.key_id, entry.status, entry.output_prefix_type = 1, tink_pb2.ENABLED, tink_pb2.RAW
    entry.key_data.type_url = "type.googleapis.com/google.crypto.tink.AesGcmHkdfStreamingKey"
    entry.key_data.value = material.SerializeToString()
    entry.key_data.key_material_type = tink_pb2.KeyData.SYMMETRIC
    handle = tink.proto_keyset_format.parse(keyset.SerializeToString(), secret_key_access.TOKEN)
    return cast(streaming_aead.StreamingAead, handle.primitive(streaming_aead.StreamingAead))


def sealed(plain: bytes) -> bytes:
    return b"".join(encrypt_stream(KEY, AAD, [plain]))


def opened(stream: bytes, key: bytes = KEY, aad: bytes = AAD) -> bytes:
    return b"".join(decrypt_stream(key, aad, [stream]))


@pytest.mark.parametrize("size", SIZES)
def test_stock_tink_opens_ours_and_we_open_stock_tinks(size: int) -> None:
    plain, tinks = os.urandom(size), stock_tink(KEY)
    assert tinks.new_decrypting_stream(io.BytesIO(sealed(plain)), AAD).read() == plain
    sink = Sink()
    with tinks.new_encrypting_stream(sink, AAD) as stream:
        stream.write(plain)
    assert len(sink.content) == ciphertext_size(size)
    assert opened(sink.content) == plain


def test_the_stock_tink_used_here_has_the_published_templates_parameters() -> None:
    template = streaming_aead.streaming_aead_key_templates.AES256_GCM_HKDF_1MB
    key_format = aes_gcm_hkdf_streaming_pb2.AesGcmHkdfStreamingKeyFormat.FromString(template.value)
    assert key_format.key_size == 32
    assert key_format.params.ciphertext_segment_size == SEGMENT_BYTES
    assert key_format.params.derived_key_size == 32
    assert key_format.params.hkdf_hash_type == common_pb2.SHA256


@pytest.mark.parametrize("size", SIZES)
def test_sizes_can_be_computed_both_ways(size: int) -> None:
    assert len(sealed(bytes(size))) == ciphertext_size(size)
    assert plaintext_size(ciphertext_size(size)) == size


@pytest.mark.parametrize("size", [0, HEADER_BYTES, HEADER_BYTES + TAG_BYTES - 1, SEGMENT_BYTES + TAG_BYTES])
def test_a_length_that_no_stream_has_is_refused(size: int) -> None:
    with pytest.raises(DecryptionError):
        plaintext_size(size)


def test_how_the_source_is_cut_does_not_matter() -> None:
    chance, plain = random.Random(1), os.urandom(2_500_000)

    def cut(data: bytes) -> Iterator[bytes]:
        position = 0
        while position < len(data):
            step = chance.choice([0, 1, 7, 70_000, SEGMENT_BYTES, 1_500_000])
            yield data[position : position + step]
            position += step

    for _ in range(5):
        stream = b"".join(encrypt_stream(KEY, AAD, cut(plain)))
        assert b"".join(decrypt_stream(KEY, AAD, cut(stream))) == plain


def test_two_streams_of_the_same_plaintext_share_no_segment() -> None:
    plain = bytes(3 * SEGMENT_BYTES)
    one, two = list(encrypt_stream(KEY, AAD, [plain])), list(encrypt_stream(KEY, AAD, [plain]))
    assert len({*one, *two}) == len(one) + len(two)


def test_every_single_bit_of_a_small_stream_counts() -> None:
    stream = sealed(b"what was sealed")
    for bit in range(8 * len(stream)):
        changed = bytearray(stream)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DecryptionError):
            opened(bytes(changed))


def test_every_truncation_of_a_small_stream_is_refused() -> None:
    stream = sealed(b"what was sealed")
    for size in range(len(stream)):
        with pytest.raises(DecryptionError):
            opened(stream[:size])


def test_lost_repeated_reordered_and_appended_segments_are_refused() -> None:
    header, *segments = encrypt_stream(KEY, AAD, [os.urandom(FIRST + 2 * FULL + 10)])
    assert len(segments) == 4
    a, b, c, d = segments
    wrong = [[a, b, c], [a, b, d], [b, c, d], [a, c, b, d], [b, a, c, d], [d, c, b, a], [a, a, b, c, d]]
    wrong += [[a, b, b, c, d], [a, b, c, d, d], [a, b, c, d, b"\0"], [a, b, c, d, header], [d], [a], []]
    for order in wrong:
        with pytest.raises(DecryptionError):
            opened(b"".join([header, *order]))
    opened(b"".join([header, *segments]))


def test_another_key_and_other_associated_data_are_refused() -> None:
    stream = sealed(b"x")
    with pytest.raises(DecryptionError):
        opened(stream, key=bytes(32))
    with pytest.raises(DecryptionError):
        opened(stream, aad=b"tenant and i")


def test_a_key_of_another_length_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        next(encrypt_stream(bytes(16), AAD, []))


def test_memory_does_not_grow_with_the_stream() -> None:
    chunk = bytes(SEGMENT_BYTES)

    def peak(mebibytes: int) -> int:
        pieces = decrypt_stream(KEY, AAD, encrypt_segments(KEY, AAD, (chunk for _ in range(mebibytes))))
        return peak_bytes(lambda: deque(pieces, maxlen=0))

    assert peak(64) < peak(4) + 2**18
    assert peak(64) < 8 * 2**20

"""Encryption of streams of any length in constant memory, in Tink's published format AES256_GCM_HKDF_1MB.

    stream   = header | segment 0 | segment 1 | ...
    header   = 0x28 (its length, 40) | salt (32) | nonce prefix (7)
    key      = HKDF-SHA256(ikm = key, salt = salt, info = associated data), 32 bytes
    segment  = AES-256-GCM(key, nonce = prefix | counter (4, big-endian) | 1 if last else 0), no associated data

Header and segment 0 fill 1 MiB of ciphertext together, every further segment but the last fills 1 MiB; the
last holds at least one byte unless the stream is empty. Counter and last flag make a lost, repeated,
reordered or appended segment fail.

Source: https://developers.google.com/tink/streaming-aead/aes_gcm_hkdf_streaming
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES = 32
TAG_BYTES = 16
SEGMENT_BYTES = 2**20
SALT_BYTES = 32
PREFIX_BYTES = 7
HEADER_BYTES = 1 + SALT_BYTES + PREFIX_BYTES

Bytes = bytes | bytearray | memoryview


class DecryptionError(Exception):
    """Some bytes are not what was sealed under this key and associated data; it never says which or why.

    Not for users: callers turn it into the error of what they were opening.
    """

    def __init__(self) -> None:
        super().__init__("verification failed")


def associated_data(domain: str, *fields: str | bytes) -> bytes:
    """Encode a domain tag and fields so that no two different lists give the same bytes.

    Each part is preceded by its length in bytes (4 bytes, big-endian); text is UTF-8.
    """
    parts = [domain.encode()] + [f.encode() if isinstance(f, str) else bytes(f) for f in fields]
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def derive_key(secret: bytes, info: bytes, *, salt: bytes | None = None) -> bytes:
    """32 bytes by HKDF-SHA256 (RFC 5869); independent for different ``info``."""
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=info).derive(secret)


def ciphertext_size(plaintext_bytes: int) -> int:
    """Bytes of the stream that holds this many bytes."""
    beyond_first = max(0, plaintext_bytes - (SEGMENT_BYTES - HEADER_BYTES - TAG_BYTES))
    segments = 1 + -(-beyond_first // (SEGMENT_BYTES - TAG_BYTES))
    return HEADER_BYTES + plaintext_bytes + segments * TAG_BYTES


def plaintext_size(ciphertext_bytes: int) -> int:
    """Bytes inside a stream of this length; undoes `ciphertext_size`.

    Raises:
        DecryptionError: no stream has this length.
    """
    segments = max(1, -(-ciphertext_bytes // SEGMENT_BYTES))
    inside = ciphertext_bytes - HEADER_BYTES - segments * TAG_BYTES
    if inside < 0 or ciphertext_size(inside) != ciphertext_bytes:
        raise DecryptionError
    return inside


def encrypt_stream(key: bytes, aad: bytes, source: Iterable[Bytes]) -> Iterator[bytes]:
    """Encrypt ``source``, cut anywhere, into the header and then segments of at most 1 MiB."""
    return map(bytes, encrypt_segments(key, aad, source))


def decrypt_stream(key: bytes, aad: bytes, source: Iterable[Bytes]) -> Iterator[bytes]:
    """Undo `encrypt_stream`; ``source`` may be cut anywhere.

    Each piece is authentic and in its place, but only the end proves that nothing is missing: use nothing
    before the iterator has ended.

    Raises:
        DecryptionError: not encrypted under this key and ``aad``, or changed, cut or continued since.
    """
    return map(bytes, decrypt_segments(key, aad, source))


def encrypt_segments(key: bytes, aad: bytes, source: Iterable[Bytes]) -> Iterator[memoryview]:
    """As `encrypt_stream`, without a copy: a piece is overwritten when the next one is asked for.

    Writing into one reused buffer is several times faster than a fresh mebibyte each time.
    """
    _check(key)
    header = bytes([HEADER_BYTES]) + os.urandom(SALT_BYTES) + os.urandom(PREFIX_BYTES)
    cipher, prefix = _cipher(key, aad, header)
    yield memoryview(header)
    full = SEGMENT_BYTES - TAG_BYTES
    sizes = itertools.chain((full - HEADER_BYTES,), itertools.repeat(full))
    buffer = memoryview(bytearray(SEGMENT_BYTES))
    for counter, (plain, last) in enumerate(_cut(source, sizes)):
        segment = buffer[: len(plain) + TAG_BYTES]
        cipher.encrypt_into(_nonce(prefix, counter, last), plain, None, segment)
        yield segment


def decrypt_segments(key: bytes, aad: bytes, source: Iterable[Bytes]) -> Iterator[memoryview]:
    """As `decrypt_stream`, without a copy: a piece is overwritten when the next one is asked for.

    Raises:
        DecryptionError: as `decrypt_stream`.
    """
    _check(key)
    sizes = itertools.chain((HEADER_BYTES, SEGMENT_BYTES - HEADER_BYTES), itertools.repeat(SEGMENT_BYTES))
    pieces = _cut(source, sizes)
    header, nothing_follows = next(pieces)
    if nothing_follows or len(header) != HEADER_BYTES or header[0] != HEADER_BYTES:
        raise DecryptionError
    cipher, prefix = _cipher(key, aad, bytes(header))
    buffer = memoryview(bytearray(SEGMENT_BYTES))
    for counter, (segment, last) in enumerate(pieces):
        if len(segment) < TAG_BYTES:
            raise DecryptionError
        plain = buffer[: len(segment) - TAG_BYTES]
        try:
            cipher.decrypt_into(_nonce(prefix, counter, last), segment, None, plain)
        except InvalidTag:
            raise DecryptionError from None
        yield plain


def _check(key: bytes) -> None:
    if len(key) != KEY_BYTES:
        raise ValueError(f"a stream key has {KEY_BYTES} bytes, not {len(key)}")


def _cipher(key: bytes, aad: bytes, header: bytes) -> tuple[AESGCM, bytes]:
    salt, prefix = header[1 : 1 + SALT_BYTES], header[1 + SALT_BYTES :]
    return AESGCM(derive_key(key, aad, salt=salt)), prefix


def _nonce(prefix: bytes, counter: int, last: bool) -> bytes:
    return prefix + counter.to_bytes(4, "big") + bytes([last])


def _cut(source: Iterable[Bytes], sizes: Iterator[int]) -> Iterator[tuple[memoryview, bool]]:
    """Cut a stream into pieces of these sizes; the last one, marked True, may be shorter, or empty at the start.

    A full piece is handed on only when a byte after it is known. Pieces are overwritten by later ones.
    """
    size = next(sizes)
    held = bytearray(SEGMENT_BYTES)
    filled = 0
    for chunk in source:
        rest = memoryview(chunk)
        while rest:
            if filled == size:
                yield memoryview(held)[:filled], False
                filled, size = 0, next(sizes)
            if not filled and len(rest) > size:
                yield rest[:size], False
                rest, size = rest[size:], next(sizes)
                continue
            taken = min(size - filled, len(rest))
            held[filled : filled + taken] = rest[:taken]
            filled, rest = filled + taken, rest[taken:]
    yield memoryview(held)[:filled], True

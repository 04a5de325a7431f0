"""Small values under AES-256-GCM, and the derivation of the keys and associated data they need."""

from __future__ import annotations

import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16
OVERHEAD_BYTES = NONCE_BYTES + TAG_BYTES


class DecryptionError(Exception):
    """Some bytes are not what was sealed under this key and associated data; it never says which or why.

    Internal to the server: its callers turn it into the error of what they were opening.
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


def new_key() -> bytes:
    """A fresh 256-bit key from the operating system."""
    return os.urandom(KEY_BYTES)


def seal(key: bytes, plaintext: bytes, aad: bytes) -> bytes:
    """Encrypt a small value: ``nonce (12) | ciphertext | tag (16)``.

    The nonce is random, so one key is good for 2**32 values (NIST SP 800-38D, 8.3).
    """
    nonce = os.urandom(NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, plaintext, aad)


def open_sealed(key: bytes, sealed: bytes, aad: bytes) -> bytes:
    """Undo `seal`.

    Raises:
        DecryptionError: not sealed under this key and ``aad``, or changed since.
    """
    if len(sealed) < OVERHEAD_BYTES:
        raise DecryptionError
    try:
        return AESGCM(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], aad)
    except InvalidTag:
        raise DecryptionError from None

"""Small values under AES-256-GCM. Key derivation and associated data are those of `tg_tinker.streaming`."""

from __future__ import annotations

import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tg_tinker.streaming import KEY_BYTES, TAG_BYTES, DecryptionError, associated_data, derive_key

__all__ = [
    "KEY_BYTES",
    "OVERHEAD_BYTES",
    "TAG_BYTES",
    "DecryptionError",
    "associated_data",
    "derive_key",
    "new_key",
    "open_sealed",
    "seal",
]
NONCE_BYTES = 12
OVERHEAD_BYTES = NONCE_BYTES + TAG_BYTES


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

"""Sealing that a quantum computer does not open: HPKE (RFC 9180) with X-Wing, which is ML-KEM-768 and X25519 at once.

    file   = "TGTXHPKE" | version (2) | recipients n (2) | commitment (32) | n slots | body
    slot   = id (16) | X-Wing ciphertext (1120) | file key, sealed (48)
    body   = a stream of `tg_tinker.streaming` under the body key, its associated data all bytes before it

Whoever records the file today and has a quantum computer tomorrow still has to break ML-KEM. HPKE suite: KEM 0x647a
(draft-ietf-hpke-pq), HKDF-SHA256, AES-256-GCM. docs/formats/export.md describes every byte.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Self

from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from tg_tinker.errors import InvalidRequestError
from tg_tinker.exports.age import MOST_RECIPIENTS
from tg_tinker.exports.errors import refused
from tg_tinker.exports.tar import Bytes
from tg_tinker.streaming import (
    KEY_BYTES,
    TAG_BYTES,
    DecryptionError,
    associated_data,
    decrypt_segments,
    derive_key,
    encrypt_segments,
)

MAGIC = b"TGTXHPKE"
VERSION = 1
RECIPIENT_PREFIX = "tg-tinker-pq-recipient-v1:"
IDENTITY_PREFIX = "TG-TINKER-PQ-IDENTITY-V1:"
MLKEM_BYTES, X25519_BYTES = 1184, 32
ENCAPSULATED_BYTES = 1120
ID_BYTES, CHECK_BYTES = 16, 4
SLOT_BYTES = ID_BYTES + ENCAPSULATED_BYTES + KEY_BYTES + TAG_BYTES
START_BYTES = len(MAGIC) + 4 + KEY_BYTES
INFO = associated_data("tg-tinker/export-hpke/v1")
_SUITE = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)


@dataclass(frozen=True, slots=True)
class Recipient:
    """A public X-Wing key: ML-KEM-768 (1184 bytes), then X25519 (32)."""

    public_key: bytes

    @classmethod
    def parse(cls, text: str) -> Self:
        """Undo ``text``.

        Raises:
            InvalidRequestError: not a recipient, or mistyped.
        """
        key = _from_line(text, RECIPIENT_PREFIX, MLKEM_BYTES + X25519_BYTES)
        if key is None:
            raise InvalidRequestError(
                "this is not a post-quantum recipient; the receiver makes one with "
                "`tg-tinker checkpoints keygen --pq`",
                field="pq_recipients",
                constraint=RECIPIENT_PREFIX + "...",
            )
        return cls(key)

    @property
    def text(self) -> str:
        """One line to hand out."""
        return _to_line(RECIPIENT_PREFIX, self.public_key)

    @property
    def id(self) -> bytes:
        """16 bytes that tell recipients apart."""
        return hashlib.sha256(self.public_key).digest()[:ID_BYTES]

    def seal(self, file_key: bytes) -> bytes:
        """The slot's last 1168 bytes."""
        key = hpke.MLKEM768X25519PublicKey(
            MLKEM768PublicKey.from_public_bytes(self.public_key[:MLKEM_BYTES]),
            X25519PublicKey.from_public_bytes(self.public_key[MLKEM_BYTES:]),
        )
        return _SUITE.encrypt(file_key, key, INFO)


@dataclass(frozen=True, slots=True, repr=False)
class Identity:
    """A private X-Wing key: the 32-byte seed of draft-connolly-cfrg-xwing-kem."""

    seed: bytes

    @classmethod
    def generate(cls) -> Self:
        """A new one."""
        return cls(os.urandom(KEY_BYTES))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Undo ``text``.

        Raises:
            InvalidRequestError: not an identity, or mistyped.
        """
        seed = _from_line(text, IDENTITY_PREFIX, KEY_BYTES)
        if seed is None:
            raise InvalidRequestError(
                "this is not a post-quantum identity", field="identity", constraint=IDENTITY_PREFIX + "..."
            )
        return cls(seed)

    @property
    def text(self) -> str:
        """One line to keep secret."""
        return _to_line(IDENTITY_PREFIX, self.seed)

    @property
    def recipient(self) -> Recipient:
        """The public half."""
        mlkem, x25519 = self._parts()
        return Recipient(mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw())

    def open(self, sealed: bytes) -> bytes:
        """Undo `Recipient.seal`; raises whatever cryptography raises."""
        mlkem, x25519 = self._parts()
        return _SUITE.decrypt(sealed, hpke.MLKEM768X25519PrivateKey(mlkem, x25519), INFO)

    def _parts(self) -> tuple[MLKEM768PrivateKey, X25519PrivateKey]:
        expanded = hashlib.shake_256(self.seed).digest(96)
        return MLKEM768PrivateKey.from_seed_bytes(expanded[:64]), X25519PrivateKey.from_private_bytes(expanded[64:])


def check_recipients(recipients: Sequence[str]) -> list[Recipient]:
    """The recipients, at least one.

    Raises:
        InvalidRequestError: none, too many, one twice, or not one.
    """
    found = [Recipient.parse(r) for r in recipients]
    if not 1 <= len(found) <= MOST_RECIPIENTS or len({r.id for r in found}) != len(found):
        raise InvalidRequestError(
            f"name 1 to {MOST_RECIPIENTS} different recipients, got {len(recipients)}",
            field="pq_recipients",
            constraint=f"1 to {MOST_RECIPIENTS} different ones",
        )
    for recipient in found:
        try:
            recipient.seal(bytes(KEY_BYTES))
        except ValueError as e:
            raise InvalidRequestError(
                "a post-quantum recipient is not a key", field="pq_recipients", constraint="a public key"
            ) from e
    return found


def seal_hpke(recipients: Sequence[str], source: Iterable[Bytes]) -> Iterator[Bytes]:
    """Encrypt pieces for all recipients; a piece is overwritten when the next is asked for.

    Raises:
        InvalidRequestError: as `check_recipients`.
    """
    found, file_key = check_recipients(recipients), os.urandom(KEY_BYTES)
    body, commitment = _keys(file_key)
    start = MAGIC + VERSION.to_bytes(2, "big") + len(found).to_bytes(2, "big") + commitment
    start += b"".join(r.id + r.seal(file_key) for r in found)
    return itertools.chain([start], encrypt_segments(body, start, source))


def open_hpke(identities: Sequence[str], source: IO[bytes]) -> Iterator[bytes]:
    """The plaintext in pieces; use nothing of it unless the iterator ends without an error.

    Raises:
        InvalidRequestError: no identity fits, or the file was altered or cut.
    """
    keys = {i.recipient.id: i for i in map(Identity.parse, identities)}
    wrong = refused("it was not sealed for this identity, or it was altered or cut")
    start = source.read(START_BYTES)
    version, count = int.from_bytes(start[8:10], "big"), int.from_bytes(start[10:12], "big")
    if len(start) != START_BYTES or not start.startswith(MAGIC) or version != VERSION:
        raise wrong
    if not 1 <= count <= MOST_RECIPIENTS:
        raise wrong
    slots = source.read(count * SLOT_BYTES)
    file_key = None
    for i in range(0, len(slots) - SLOT_BYTES + 1, SLOT_BYTES):
        slot = slots[i : i + SLOT_BYTES]
        if slot[:ID_BYTES] in keys and file_key is None:
            try:
                file_key = keys[slot[:ID_BYTES]].open(slot[ID_BYTES:])
            except Exception as e:  # of several kinds, all meaning that the slot was not sealed for this key
                raise wrong from e
    if file_key is None or len(slots) != count * SLOT_BYTES:
        raise wrong
    body, commitment = _keys(file_key)
    if not hmac.compare_digest(commitment, start[12:]):
        raise wrong
    try:
        for piece in decrypt_segments(body, start + slots, iter(lambda: source.read(2**20), b"")):
            yield bytes(piece)
    except DecryptionError as e:
        raise wrong from e


def _keys(file_key: bytes) -> tuple[bytes, bytes]:
    return (
        derive_key(file_key, associated_data("tg-tinker/export-hpke/body/v1")),
        derive_key(file_key, associated_data("tg-tinker/export-hpke/commitment/v1")),
    )


def _to_line(prefix: str, key: bytes) -> str:
    return prefix + base64.b64encode(key + hashlib.sha256(key).digest()[:CHECK_BYTES]).decode()


def _from_line(text: str, prefix: str, size: int) -> bytes | None:
    text = text.strip()
    try:
        data = base64.b64decode(text.removeprefix(prefix), validate=True)
    except (binascii.Error, ValueError):
        return None
    key = data[:size]
    return key if text == _to_line(prefix, key) and len(key) == size else None

"""Keys of one attempt at a round: what a site draws, what it shows, what two sites derive from each other's.

A site draws 32 bytes per attempt. Everything else follows from them by HKDF-SHA256 and AES-256 in counter mode, so
that a step that is repeated gives the same bytes. What is opened says nothing about the 32 bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tg_tinker.errors import FederationRefusedError
from tg_tinker.federated.masking import shamir
from tg_tinker.federated.masking.facts import Facts, digest, raw, refused, text
from tg_tinker.federated.masking.setting import MaskingSetting, Place

SECRET_BYTES = 32
_KEY_BYTES = 32
SIGNATURE_BYTES = 64
_SHOWN = {"base", "mask_key", "share_key", "commitment"}
_ANY_KEY = bytes(32)  # for a point of small order any gives zero
_NONCE = bytes(12)  # each sealing key is for one message
SEALED_BYTES = 2 * shamir.SHARE_BYTES + 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Advertisement:
    """What a site shows of its keys, signed by its identity key.

    Attributes:
        base: digest of the weights that the site will train from, hex. In the sum are sites with one base alone: an
            update from weights of the coordinator's choice may be zero, and the others' sum then one site's update.
        mask_key: X25519; for the masks that two sites share.
        share_key: X25519; for sealing shares.
        commitment: to the seed of the personal mask.
    """

    base: str
    mask_key: bytes
    share_key: bytes
    commitment: bytes
    signature: bytes

    @classmethod
    def read(cls, facts: object, *, site: str) -> Self:
        """Read what is said to be ``site``'s. Its signature is not checked yet.

        Raises:
            FederationRefusedError: reason "masking": malformed.
        """
        of = f"the keys of site {site[:80]!r}"
        if not isinstance(facts, Mapping) or set(facts) != _SHOWN | {"signature"}:
            raise refused(f"{of} lack a field or have one too many")
        return cls(
            base=digest(facts, "base", of=of),
            mask_key=raw(facts, "mask_key", _KEY_BYTES, of=of),
            share_key=raw(facts, "share_key", _KEY_BYTES, of=of),
            commitment=raw(facts, "commitment", _KEY_BYTES, of=of),
            signature=raw(facts, "signature", SIGNATURE_BYTES, of=of),
        )

    def facts(self) -> Facts:
        """As JSON."""
        return {**self.shown(), "signature": text(self.signature)}

    def shown(self) -> Facts:
        """All but the signature."""
        return {
            "base": self.base,
            "mask_key": text(self.mask_key),
            "share_key": text(self.share_key),
            "commitment": text(self.commitment),
        }

    def verify(self, site: str, identity: Ed25519PublicKey, place: Place) -> None:
        """Require the site's signature, made for this place, and keys with which secrets can be agreed.

        Raises:
            FederationRefusedError: reason "bad_signature" or "masking".
        """
        try:
            identity.verify(self.signature, _advertised(place, site, self.shown()))
        except InvalidSignature:
            raise FederationRefusedError(
                f"the keys of site {site!r} are not signed by its identity key for {place}: they were exchanged or "
                "replayed on the way; do not go on with this coordinator before that is explained",
                reason="bad_signature",
            ) from None
        for key in (self.mask_key, self.share_key):
            _agree(_ANY_KEY, key, site)


class AttemptSecrets:
    """All that a site keeps to itself in one attempt, from its 32 random bytes."""

    def __init__(self, secret: bytes, site: str, place: Place) -> None:
        """Derive; ``secret`` is 32 uniform bytes that no other attempt uses."""
        if len(secret) != SECRET_BYTES:
            raise ValueError("the secret of an attempt has 32 bytes")
        self._secret, self._site, self._place = secret, site, place
        self.mask_key = self._derive("mask key")
        self.share_key = self._derive("share key")
        self.personal_seed = self._derive("personal seed")

    def advertise(self, identity: Ed25519PrivateKey, base: str) -> Advertisement:
        """The public halves and the base, signed."""
        unsigned = Advertisement(
            base=base,
            mask_key=public_of(self.mask_key),
            share_key=public_of(self.share_key),
            commitment=commitment(self._place, self._site, self.personal_seed),
            signature=b"",
        )
        signature = identity.sign(_advertised(self._place, self._site, unsigned.shown()))
        return replace(unsigned, signature=signature)

    def shares(self, setting: MaskingSetting) -> dict[str, bytes]:
        """By site of the roster: its share of the mask key, then its share of the personal seed."""
        points = {site: setting.point(site) for site in setting.roster}
        size = shamir.COEFFICIENT_BYTES * (setting.threshold - 1)

        def split(secret: bytes, purpose: str) -> dict[int, bytes]:
            randomness = keystream(self._derive(purpose), size)
            return shamir.split(secret, points.values(), threshold=setting.threshold, randomness=randomness)

        of_key = split(self.mask_key, "mask key's polynomial")
        of_seed = split(self.personal_seed, "personal seed's polynomial")
        return {site: of_key[point] + of_seed[point] for site, point in points.items()}

    def _derive(self, purpose: str) -> bytes:
        return hkdf(self._secret, self._place.bind("tg-tinker/masking/secret/v1", site=self._site, purpose=purpose))


def public_of(private: bytes) -> bytes:
    """The public half of an X25519 key."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def commitment(place: Place, site: str, personal_seed: bytes) -> bytes:
    """What a site shows of its personal seed beforehand: hides it, and fits no other."""
    bound = place.bind("tg-tinker/masking/commitment/v1", site=site, personal_seed=text(personal_seed))
    return hashlib.sha256(bound).digest()


def pair_seed(place: Place, private: bytes, *, own: str, peer: str, peer_key: bytes) -> bytes:
    """The seed of the mask that two sites share; both get the same.

    Raises:
        FederationRefusedError: reason "masking": the peer's key is none (RFC 7748 §6.1).
    """
    keys = {own: public_of(private), peer: peer_key}
    pair = sorted(keys)
    bound = place.bind("tg-tinker/masking/pair/v1", sites=pair, keys=[text(keys[name]) for name in pair])
    return hkdf(_agree(private, peer_key, peer), bound)


def seal(place: Place, private: bytes, data: bytes, *, sender: str, receiver: str, receiver_key: bytes) -> bytes:
    """Shares from ``sender`` that only ``receiver`` opens; ``private`` is the sender's share key."""
    bound = _sealing(place, sender, public_of(private), receiver, receiver_key)
    return AESGCM(hkdf(_agree(private, receiver_key, receiver), bound)).encrypt(_NONCE, data, bound)


def unseal(place: Place, private: bytes, sealed: bytes, *, sender: str, sender_key: bytes, receiver: str) -> bytes:
    """Undo ``seal``; ``private`` is the receiver's share key.

    Raises:
        FederationRefusedError: reason "masking": altered, for somebody else, from another place, or garbage.
    """
    bound = _sealing(place, sender, sender_key, receiver, public_of(private))
    try:
        data = AESGCM(hkdf(_agree(private, sender_key, sender), bound)).decrypt(_NONCE, sealed, bound)
    except InvalidTag:
        data = b""
    if len(data) != 2 * shamir.SHARE_BYTES:
        raise refused(
            f"the shares from site {sender!r} cannot be opened: altered on their way, or not made by the protocol; "
            "which of the two cannot be told"
        )
    return data


def keystream(key: bytes, size: int) -> bytes:
    """AES-256 in counter mode from zero (NIST SP 800-38A): ``size`` bytes. A key is used once."""
    return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(size))


def _advertised(place: Place, site: str, shown: Facts) -> bytes:
    return place.bind("tg-tinker/masking/keys/v1", site=site, **shown)


def _sealing(place: Place, sender: str, sender_key: bytes, receiver: str, receiver_key: bytes) -> bytes:
    return place.bind(
        "tg-tinker/masking/shares/v1",
        sender=sender,
        sender_key=text(sender_key),
        receiver=receiver,
        receiver_key=text(receiver_key),
    )


def _agree(private: bytes, peer_key: bytes, peer: str) -> bytes:
    try:
        return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(peer_key))
    except ValueError:  # a point of small order: the secret would be zero, whatever our key
        raise refused(f"a key of site {peer!r} is not a key: everybody could derive the masks made with it") from None


def hkdf(key: bytes, info: bytes) -> bytes:
    """HKDF-SHA256 without salt (RFC 5869): 32 bytes."""
    return HKDF(algorithm=SHA256(), length=_KEY_BYTES, salt=None, info=info).derive(key)

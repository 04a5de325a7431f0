"""The signing key of each tenant: it signs checkpoints of the log, reports and export manifests, and nothing else.

Ed25519 (RFC 8032). The seed is derived from the tenant's secret, so the key is the same for ever, through every
rotation, and gone when the tenant's keys are destroyed; what it signed before stays verifiable.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tg_tinker.exports.model_signing import P256_ORDER
from tg_tinker_server.crypto.envelope import TenantKeyring

PURPOSE = "log-signing/v1"
MODEL_PURPOSE = "model-signing-p256/v1"
ORIGIN_DOMAIN = b"tg-tinker/log-id/v1\x00"
ED25519 = b"\x01"  # the algorithm's byte in C2SP signed notes


class Signer:
    """One tenant's key, in memory.

    Attributes:
        public_key: the 32 bytes that verify.
        origin: name of the tenant's log and of this key, a digest of the public key: it tells nothing of the tenant.
        verifier_key: the public key as C2SP signed notes write it (``<name>+<hash>+<base64>``): what to hand out.
    """

    __slots__ = ("_key", "key_hash", "origin", "public_key", "verifier_key")

    def __init__(self, seed: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public_key = self._key.public_key().public_bytes_raw()
        self.origin = "tg-tinker/" + hashlib.sha256(ORIGIN_DOMAIN + self.public_key).hexdigest()[:32]
        typed = ED25519 + self.public_key
        self.key_hash = hashlib.sha256(self.origin.encode() + b"\n" + typed).digest()[:4]
        self.verifier_key = f"{self.origin}+{self.key_hash.hex()}+{base64.b64encode(typed).decode()}"

    def sign_note(self, body: str) -> str:
        """A C2SP signed note of ``body``, which ends in a newline (https://c2sp.org/signed-note).

        Raises:
            ValueError: a text that no note can hold.
        """
        if not body.endswith("\n") or any(ord(c) < 0x20 and c != "\n" for c in body):
            raise ValueError("a note is lines of text without control characters, and ends in a newline")
        signature = self.key_hash + self._key.sign(body.encode())
        return f"{body}\n— {self.origin} {base64.b64encode(signature).decode()}\n"

    def sign_dsse(self, payload_type: str, payload: bytes) -> dict[str, Any]:
        """A DSSE envelope around ``payload``, as a JSON value (https://github.com/secure-systems-lab/dsse)."""
        kind = payload_type.encode()
        signed = b" ".join([b"DSSEv1", str(len(kind)).encode(), kind, str(len(payload)).encode(), payload])
        signature = {"keyid": self.key_hash.hex(), "sig": base64.b64encode(self._key.sign(signed)).decode()}
        return {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": payload_type,
            "signatures": [signature],
        }

    def __repr__(self) -> str:
        return f"Signer({self.origin})"

    def __reduce__(self) -> str:
        raise TypeError("a signing key is not pickled")


class ModelSigner:
    """One tenant's key of P-256, for OpenSSF Model Signing, whose tools know no Ed25519.

    Attributes:
        public_pem: what verifies (PEM, SubjectPublicKeyInfo).
    """

    __slots__ = ("_key", "public_pem")

    def __init__(self, seed: bytes) -> None:
        # FIPS 186-5, A.2.1: 32 bits more than the order has, reduced, leave no bias worth naming.
        wide = hashlib.shake_256(b"tg-tinker/p256-scalar/v1\x00" + seed).digest(40)
        self._key = ec.derive_private_key(int.from_bytes(wide, "big") % (P256_ORDER - 1) + 1, ec.SECP256R1())
        self.public_pem = self._key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    def sign(self, message: bytes) -> bytes:
        """ECDSA over SHA-256 (RFC 6979: no random numbers), DER, with the smaller of the two possible s."""
        algorithm = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)
        r, s = utils.decode_dss_signature(self._key.sign(message, algorithm))
        return utils.encode_dss_signature(r, min(s, P256_ORDER - s))

    def __repr__(self) -> str:
        return "ModelSigner(...)"

    def __reduce__(self) -> str:
        raise TypeError("a signing key is not pickled")


@dataclass(frozen=True, slots=True)
class TenantSigner:
    """Finds the signing key of a tenant."""

    keyring: TenantKeyring

    def signer(self, tenant: str) -> Signer:
        """The tenant's key.

        Raises:
            InvalidRequestError: the tenant's keys were destroyed; nothing is signed in its name any more.
        """
        return Signer(self.keyring.mac_key(tenant, PURPOSE))

    def model_signer(self, tenant: str) -> ModelSigner:
        """The tenant's key for model signing bundles.

        Raises:
            InvalidRequestError: as `signer`.
        """
        return ModelSigner(self.keyring.mac_key(tenant, MODEL_PURPOSE))

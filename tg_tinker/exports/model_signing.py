"""An OpenSSF Model Signing bundle, so that ``model_signing verify key`` accepts an exported folder.

The format is that of model-signing 1.x (https://github.com/sigstore/model-transparency): a Sigstore bundle v0.3 with
a DSSE envelope over an in-toto statement that lists the SHA-256 of every file but ``model.sig`` itself. Its
tools know no Ed25519, so a P-256 key signs the bundle; the manifest vouches for its public half, ``model.pub``.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import rfc8785
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils

from tg_tinker.exports.errors import refused
from tg_tinker.exports.manifest import PAYLOAD_TYPE, STATEMENT_TYPE, read_json
from tg_tinker.exports.tar import BUNDLE
from tg_tinker.transparency.dsse import pae

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_SERIALIZATION = {
    "allow_symlinks": False,
    "hash_type": "sha256",
    "ignore_paths": [BUNDLE],
    "method": "files",
}


def bundle_payload(folder: str, files: Mapping[str, str]) -> bytes:
    """The statement over ``files`` (SHA-256 in hex by name), canonical: what is signed."""
    names = sorted(files)
    root = hashlib.sha256(b"".join(bytes.fromhex(files[n]) for n in names)).hexdigest()
    statement: dict[str, Any] = {
        "_type": STATEMENT_TYPE,
        "predicate": {
            "resources": [{"algorithm": "sha256", "digest": files[n], "name": n} for n in names],
            "serialization": _SERIALIZATION,
        },
        "predicateType": PREDICATE_TYPE,
        "subject": [{"digest": {"sha256": root}, "name": folder}],
    }
    return bytes(rfc8785.dumps(statement))


def make_bundle(folder: str, files: Mapping[str, str], public_pem: bytes, sign: Callable[[bytes], bytes]) -> bytes:
    """``model.sig``.

    Args:
        sign: ECDSA over SHA-256 with the private half of ``public_pem``, DER.
    """
    payload = bundle_payload(folder, files)
    return _bundle(payload, public_pem, sign(pae(PAYLOAD_TYPE, payload)))


def check_bundle(data: bytes, folder: str, files: Mapping[str, str], public_pem: bytes) -> None:
    """Check that ``data`` is the bundle over exactly these files, by this key, in its one spelling.

    Raises:
        InvalidRequestError: it is not.
    """
    payload = bundle_payload(folder, files)
    try:
        encoded = read_json(data, BUNDLE)["dsseEnvelope"]["signatures"][0]["sig"]
        signature = base64.b64decode(encoded, validate=True)
        r, s = utils.decode_dss_signature(signature)
    except (KeyError, IndexError, TypeError, ValueError, binascii.Error) as e:
        raise refused(f"its {BUNDLE} is not a signature bundle") from e
    # (r, s) and (r, n - s) both verify; the writer's is the smaller one.
    if data != _bundle(payload, public_pem, signature) or s > P256_ORDER // 2:
        raise refused(f"its {BUNDLE} is not over these files")
    try:
        key = serialization.load_pem_public_key(public_pem)
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise refused("its model.pub is not a key of P-256")
        key.verify(utils.encode_dss_signature(r, s), pae(PAYLOAD_TYPE, payload), ec.ECDSA(hashes.SHA256()))
        if utils.encode_dss_signature(r, s) != signature:
            raise InvalidSignature
    except (ValueError, UnsupportedAlgorithm, InvalidSignature) as e:
        raise refused(f"the signature of its {BUNDLE} is wrong") from e


def _bundle(payload: bytes, public_pem: bytes, signature: bytes) -> bytes:
    value: dict[str, Any] = {
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"keyid": "", "sig": base64.b64encode(signature).decode()}],
        },
        "mediaType": MEDIA_TYPE,
        "verificationMaterial": {"publicKey": {"hint": hashlib.sha256(public_pem).hexdigest()}, "tlogEntries": []},
    }
    return bytes(rfc8785.dumps(value))

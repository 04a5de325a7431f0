"""What a tenant's key signs, checked by hand: with the raw public key and the published formats."""

from __future__ import annotations

import base64
import hashlib
import pickle

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tg_tinker.errors import InvalidRequestError
from tg_tinker.exports.model_signing import P256_ORDER
from tg_tinker.transparency.dsse import open_envelope
from tg_tinker.transparency.note import VerifierKey, open_note
from tg_tinker_server.crypto.envelope import TenantKeyring
from tg_tinker_server.crypto.key_rows import MemoryKeyRows
from tg_tinker_server.crypto.keys import LocalKeyProvider
from tg_tinker_server.crypto.signing import Signer, TenantSigner


@pytest.fixture
def keyring() -> TenantKeyring:
    return TenantKeyring(LocalKeyProvider(bytes(range(32))), MemoryKeyRows())


def verify(signer: Signer, signature: bytes, message: bytes) -> None:
    Ed25519PublicKey.from_public_bytes(signer.public_key).verify(signature, message)


def test_a_tenant_keeps_its_key_through_rotations_and_shares_it_with_nobody(keyring: TenantKeyring) -> None:
    signers = TenantSigner(keyring)
    before = signers.signer("acme").verifier_key
    keyring.rotate("acme")
    keyring.destroy_old_versions("acme")
    assert signers.signer("acme").verifier_key == before
    assert signers.signer("other").verifier_key != before
    assert signers.signer("acme").public_key != keyring.mac_key("acme", "log-signing/v1")


def test_a_shredded_tenant_signs_nothing_more(keyring: TenantKeyring) -> None:
    signers = TenantSigner(keyring)
    signers.signer("acme")
    keyring.destroy_tenant("acme")
    with pytest.raises(InvalidRequestError, match="destroyed"):
        signers.signer("acme")


def test_the_names_of_a_key_are_digests_of_it() -> None:
    signer = Signer(bytes(32))
    public = Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key().public_bytes_raw()
    assert signer.origin == "tg-tinker/" + hashlib.sha256(b"tg-tinker/log-id/v1\0" + public).hexdigest()[:32]
    name, key_hash, encoded = signer.verifier_key.split("+", 2)
    assert name == signer.origin
    assert base64.b64decode(encoded) == b"\x01" + public
    assert key_hash == hashlib.sha256(f"{name}\n".encode() + b"\x01" + public).hexdigest()[:8]


def test_a_note_is_signed_over_its_text() -> None:
    signer, body = Signer(bytes(32)), "a log\n7\nAAAA\n"
    text, _, line = signer.sign_note(body).partition("\n\n")
    dash, name, encoded = line.removesuffix("\n").split(" ")
    signature = base64.b64decode(encoded)
    assert (dash, name, text + "\n") == ("—", signer.origin, body)
    assert signature[:4].hex() == signer.verifier_key.split("+")[1]
    verify(signer, signature[4:], body.encode())
    with pytest.raises(InvalidSignature):
        verify(signer, signature[4:], b"a log\n8\nAAAA\n")


@pytest.mark.parametrize("body", ["", "no newline", "a\tb\n", "a\0\n"])
def test_what_is_no_note_is_not_signed(body: str) -> None:
    with pytest.raises(ValueError, match="note"):
        Signer(bytes(32)).sign_note(body)


def test_an_envelope_is_signed_over_its_type_and_payload() -> None:
    signer = Signer(bytes(32))
    envelope = signer.sign_dsse("application/x", b'{"a":1}')
    (signature,) = envelope["signatures"]
    assert base64.b64decode(envelope["payload"]) == b'{"a":1}'
    assert signature["keyid"] == signer.verifier_key.split("+")[1]
    verify(signer, base64.b64decode(signature["sig"]), b'DSSEv1 13 application/x 7 {"a":1}')


def test_a_signing_key_leaves_the_process_neither_in_a_log_nor_in_a_pickle() -> None:
    signer = Signer(b"s" * 32)
    assert repr(signer) == f"Signer({signer.origin})"
    with pytest.raises(TypeError):
        pickle.dumps(signer)


def test_the_key_for_model_signing_is_another_one_and_signs_alike_each_time(keyring: TenantKeyring) -> None:
    signers = TenantSigner(keyring)
    signer, again, other = signers.model_signer("acme"), signers.model_signer("acme"), signers.model_signer("other")
    assert signer.public_pem == again.public_pem != other.public_pem
    signature = signer.sign(b"message")
    assert signature == again.sign(b"message")
    public = serialization.load_pem_public_key(signer.public_pem)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    public.verify(signature, b"message", ec.ECDSA(hashes.SHA256()))
    _, s = utils.decode_dss_signature(signature)
    assert s <= P256_ORDER // 2
    with pytest.raises(TypeError):
        pickle.dumps(signer)
    assert "acme" not in repr(signer)


def test_the_sdk_reads_what_a_tenant_signs() -> None:
    signer = Signer(b"k" * 32)
    key = VerifierKey.parse(signer.verifier_key)
    assert key == VerifierKey.of(signer.public_key)
    assert open_note(signer.sign_note("a\nb\n"), key) == "a\nb\n"
    assert open_envelope(signer.sign_dsse("t", b"payload"), key, payload_type="t") == b"payload"

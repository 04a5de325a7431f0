"""A private certificate authority for a SuperLink, its server certificate, and keys of SuperNodes.

Certificates follow RFC 5280 strictly enough for OpenSSL's X509_STRICT; node keys are EC P-384 in OpenSSH form, which
is what Flower takes.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tg_tinker.errors import InvalidRequestError
from tg_tinker.federated.keys import read_secret, require_new, write_public, write_secret

_CLOCK_SKEW = timedelta(hours=1)
_LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)\Z")
_LONGEST_NAME = 253


def make_authority(certificate: Path, key: Path, *, days: int = 3650) -> None:
    """Make a self-signed authority: the certificate goes to every site, the key never leaves its owner.

    Raises:
        InvalidRequestError: a file exists; nothing is ever overwritten.
        ServerError: a file cannot be written.
    """
    require_new(certificate, key)
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "TG-Tinker federation")])
    builder = _builder(name, name, private.public_key(), days)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    write_secret(key, _pem(private))
    write_public(certificate, builder.sign(private, SHA256()).public_bytes(Encoding.PEM))


def make_server_certificate(
    certificate: Path, key: Path, *, authority: Path, authority_key: Path, hosts: Sequence[str], days: int = 825
) -> None:
    """Make a server certificate that the authority signs.

    Args:
        hosts: names and IP addresses by which sites reach the SuperLink.

    Raises:
        InvalidRequestError: no host or one that is no name, a file exists, or the authority cannot be read. Nothing
            is written then.
        ServerError: a file cannot be written.
    """
    names = checked_hosts(hosts)
    require_new(certificate, key)
    issuer, issuer_key = _read_authority(authority, authority_key)
    private = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    builder = _builder(subject, issuer.subject, private.public_key(), days)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False
    )
    write_secret(key, _pem(private))
    write_public(certificate, builder.sign(issuer_key, SHA256()).public_bytes(Encoding.PEM))


def checked_hosts(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """Names for a certificate, to be asked before anything is written.

    Raises:
        InvalidRequestError: there is none, or one is neither a host name (RFC 1123) nor an IP address.
    """
    if not hosts:
        raise InvalidRequestError("a server certificate needs at least one name or IP address", field="hosts")
    return [_host(host) for host in hosts]


def make_node_key(path: Path) -> Path:
    """Make a SuperNode's key; the path of its public half, ``<path>.pub``, which the coordinator registers.

    Raises:
        InvalidRequestError: a file exists; nothing is ever overwritten.
        ServerError: a file cannot be written.
    """
    public = path.with_name(path.name + ".pub")
    require_new(path, public)
    private = ec.generate_private_key(ec.SECP384R1())
    write_secret(path, private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    write_public(public, private.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n")
    return public


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=public)
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - _CLOCK_SKEW).not_valid_after(now + timedelta(days=days))
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        pass
    labels = text.split(".")
    if len(text) <= _LONGEST_NAME and all(map(_LABEL.match, labels)) and not labels[-1].isdigit():
        return x509.DNSName(text)
    raise InvalidRequestError(
        f"{text[:80]!r} is neither a host name nor an IP address: give it as in coordinator.example.org, without a "
        "scheme or port; a name with other letters in its A-label form (xn--...)",
        field="hosts",
        constraint="letters, digits, hyphens and dots",
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _read_authority(certificate: Path, key: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    try:
        issuer = x509.load_pem_x509_certificate(certificate.read_bytes())
        private = load_pem_private_key(read_secret(key), password=None)
    except (OSError, ValueError) as e:
        raise InvalidRequestError(
            f"cannot read the authority in {certificate} and {key}: {e}", field="authority"
        ) from e
    if not isinstance(private, ec.EllipticCurvePrivateKey) or issuer.public_key() != private.public_key():
        raise InvalidRequestError(f"{key} is not the key of {certificate}", field="authority_key")
    return issuer, private

"""Where the server is and how to prove who we are: arguments, then environment, then defaults."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import ServiceConfig

ENVIRONMENT_PREFIX = "TG_TINKER_"
DEFAULT_BASE_URL = "localhost:50051"
DEFAULT_TIMEOUT_S = 300.0
DEFAULT_RETRY_COUNT = 3
_PORTS = {"": 50051, "grpc": 50051, "grpcs": 50051, "http": 80, "https": 443}
_TLS_SCHEMES = ("grpcs", "https")
_ADDRESS = re.compile(r"^(?P<host>\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?/?$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A checked address. ``target`` is ``host:port``."""

    target: str
    tls: bool
    loopback: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """PEM bytes for TLS; ``None`` uses the system's roots and no client certificate."""

    ca: bytes | None = None
    cert: bytes | None = None
    key: bytes | None = None


def parse_base_url(base_url: str) -> Endpoint:
    """Read ``host:port``, ``grpc://``, ``grpcs://``, ``http://`` or ``https://``.

    Raises:
        InvalidRequestError: not an address, or plaintext to another machine without saying ``grpc://``.
    """
    scheme, separator, rest = base_url.strip().rpartition("://")
    scheme = scheme.lower()
    match = _ADDRESS.match(rest)
    port = int(match["port"] or _PORTS.get(scheme, 0)) if match else 0
    if match is None or scheme not in _PORTS or (separator and not scheme) or not 0 < port < 65536:
        raise InvalidRequestError(
            f"base_url {base_url!r} is not an address; write host:port, grpc://host:port or grpcs://host:port",
            field="base_url",
            constraint="host:port, grpc://, grpcs://, http:// or https://",
        )
    host = match["host"]
    tls, loopback = scheme in _TLS_SCHEMES, _is_loopback(host)
    if not tls and not loopback and scheme != "grpc":
        raise InvalidRequestError(
            f"base_url {base_url!r} would send the API key and the training data unencrypted to another machine; "
            f"write grpcs://{host}:{port} for TLS, or grpc://{host}:{port} if the network itself is private",
            field="base_url",
            constraint="TLS, loopback, or grpc:// written out",
        )
    return Endpoint(target=f"{host}:{port}", tls=tls, loopback=loopback)


def resolve(
    *,
    api_key: str | None,
    base_url: str | None,
    tenant_id: str | None,
    timeout: float,
    retry_count: int,
    environ: Mapping[str, str] = os.environ,
) -> ServiceConfig:
    """Fill what was not given from ``TG_TINKER_*``. A number that differs from its default was given.

    Raises:
        InvalidRequestError: a setting that cannot be, named after its argument.
    """
    if timeout == DEFAULT_TIMEOUT_S:
        timeout = _number(environ, "timeout", DEFAULT_TIMEOUT_S)
    if retry_count == DEFAULT_RETRY_COUNT:
        retry_count = int(_number(environ, "retry_count", DEFAULT_RETRY_COUNT))
    for name, holds, constraint in (
        ("timeout", 0 < timeout < float("inf"), "> 0 seconds"),
        ("retry_count", retry_count >= 0, ">= 0"),
    ):
        if not holds:
            raise InvalidRequestError(f"{name} must be {constraint}", field=name, constraint=constraint)
    tenant = tenant_id or environ.get("TG_TINKER_TENANT_ID") or None
    if tenant is not None and not (tenant.isascii() and tenant.isprintable()):
        raise InvalidRequestError(
            "tenant_id must be printable ASCII", field="tenant_id", constraint="printable ASCII"
        )
    address = base_url or environ.get("TG_TINKER_BASE_URL") or DEFAULT_BASE_URL
    return ServiceConfig(
        base_url=address,
        timeout=float(timeout),
        retry_count=retry_count,
        tls=parse_base_url(address).tls,
        api_key=(api_key or environ.get("TG_TINKER_API_KEY") or "").strip() or None,
        tenant_id=tenant,
    )


def read_tls_files(environ: Mapping[str, str] = os.environ) -> TlsFiles:
    """PEM files named by ``TG_TINKER_TLS_CA``, ``TG_TINKER_TLS_CERT`` and ``TG_TINKER_TLS_KEY``.

    Raises:
        InvalidRequestError: a file cannot be read, or a certificate is given without its key.
    """
    contents: dict[str, bytes | None] = {}
    for name in ("ca", "cert", "key"):
        variable = f"{ENVIRONMENT_PREFIX}TLS_{name.upper()}"
        path = environ.get(variable)
        try:
            contents[name] = Path(path).read_bytes() if path else None
        except OSError as e:
            raise InvalidRequestError(f"{variable}: {e}", field=variable, constraint="a readable PEM file") from e
    if (contents["cert"] is None) != (contents["key"] is None):
        raise InvalidRequestError(
            "TG_TINKER_TLS_CERT and TG_TINKER_TLS_KEY go together: set both or neither",
            field="TG_TINKER_TLS_CERT",
            constraint="both or neither",
        )
    return TlsFiles(**contents)


def _number(environ: Mapping[str, str], name: str, default: float) -> float:
    text = environ.get(ENVIRONMENT_PREFIX + name.upper())
    if not text:
        return default
    try:
        return float(text)
    except ValueError as e:
        raise InvalidRequestError(
            f"{ENVIRONMENT_PREFIX}{name.upper()}={text!r} is not a number", field=name, constraint="a number"
        ) from e


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]").partition("%")[0]).is_loopback
    except ValueError:
        return False

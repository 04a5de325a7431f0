"""What a site and the coordinator must know to reach each other over Flower; part of their own configurations.

Relative paths are relative to the folder of the configuration file: whoever loads it calls `under`.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from tg_tinker.federated.job import SiteName

_HOST = re.compile(r"^(?!-)[A-Za-z0-9.-]{1,253}$")


def split_address(text: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[IPv6]:port".

    Raises:
        ValueError: it is neither.
    """
    host, separator, port = text.rpartition(":")
    if not separator or not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise ValueError(f"{text!r} is not host:port, e.g. coordinator.example.org:8000")
    if host.startswith("[") and host.endswith("]"):
        return str(ipaddress.IPv6Address(host[1:-1])), int(port)
    if not _HOST.match(host):
        raise ValueError(f"{text!r} is not host:port, e.g. coordinator.example.org:8000")
    return host, int(port)


def _checked(text: str) -> str:
    split_address(text)
    return text


Address = Annotated[str, AfterValidator(_checked)]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def under(self, folder: Path) -> Self:
        """The same with relative paths taken from ``folder``."""
        changed: dict[str, object] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Path):
                changed[name] = folder / value
            elif isinstance(value, dict):
                changed[name] = {key: folder / path for key, path in value.items()}
        return self.model_copy(update=changed)


class FlowerSite(_Settings):
    """How a site reaches the coordinator's SuperLink.

    Attributes:
        superlink: host:port.
        root_certificates: PEM file that vouches for the SuperLink's certificate; given by the coordinator.
        node_key: the SuperNode's EC key in OpenSSH form; the coordinator registers ``<node_key>.pub``.
        state_dir: logs and Flower's own files.
        supernode: host:port, on this computer, of the Runtime API of a SuperNode that somebody else runs, under
            another user or in a container, with ``--isolation process`` and ``--superexec-auth-secret-file``. It has
            the node key and the certificates then. ``None``: one is started, under this user.
        tasks_secret: that file, with ``supernode``.
    """

    superlink: Address
    root_certificates: Path
    node_key: Path
    state_dir: Path = Path("flower")
    supernode: Address | None = None
    tasks_secret: Path | None = None

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.supernode is None) != (self.tasks_secret is None):
            raise ValueError("supernode and tasks_secret belong together: give both or none")
        if self.supernode is not None and split_address(self.supernode)[0] not in ("127.0.0.1", "::1", "localhost"):
            raise ValueError(
                f"supernode {self.supernode!r} is not on this computer; its Runtime API is not encrypted"
            )
        return self


class FlowerCoordinator(_Settings):
    """How the coordinator's SuperLink is run.

    Attributes:
        address: host:port to listen on; "0.0.0.0:8000" for all interfaces.
        ca: PEM file; sites need it as ``root_certificates``.
        certificate: the SuperLink's, PEM, signed by ``ca`` for the name or address that sites use.
        key: its private key.
        state_dir: logs and Flower's own files.
        node_keys: each site's public node key (OpenSSH). Other nodes are turned away.
        largest_body: bytes of one request of a registered node, which the SuperLink holds in memory; an update's
            largest array must fit. Of strangers it reads 1 MiB at most.
    """

    address: Address = "127.0.0.1:8000"
    ca: Path
    certificate: Path
    key: Path
    state_dir: Path = Path("flower")
    node_keys: dict[SiteName, Path] = Field(min_length=1)
    largest_body: int = Field(2**31, ge=2**20, le=2**40)

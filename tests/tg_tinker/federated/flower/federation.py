"""A federation of real processes on this computer: a SuperLink's settings, toy sites, and what they leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tg_tinker.federated.flower.certificates import make_authority, make_node_key, make_server_certificate
from tg_tinker.federated.flower.program import free_port
from tg_tinker.federated.flower_settings import FlowerCoordinator, FlowerSite
from tg_tinker.federated.keys import make_identity, public_text


@dataclass
class Federation:
    """Files of a coordinator and its sites under one folder."""

    folder: Path
    names: Sequence[str]
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    port: int = field(default_factory=free_port)
    roster: dict[str, str] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        make_authority(self.folder / "ca.crt", self.folder / "ca.key")
        make_server_certificate(
            self.folder / "server.pem",
            self.folder / "server.key",
            authority=self.folder / "ca.crt",
            authority_key=self.folder / "ca.key",
            hosts=["127.0.0.1"],
        )
        for name in self.names:
            (self.folder / name).mkdir()
            make_node_key(self.folder / name / "node.key")
            self.roster[name] = public_text(make_identity(self.folder / name / "identity.key"))
            (self.folder / name / "site.json").write_text(self.site(name).model_dump_json(), encoding="utf-8")

    def site(self, name: str) -> FlowerSite:
        """A site's settings."""
        return FlowerSite(
            superlink=f"127.0.0.1:{self.port}",
            root_certificates=self.folder / "ca.crt",
            node_key=self.folder / name / "node.key",
            state_dir=self.folder / name / "flower",
        )

    def coordinator(self) -> FlowerCoordinator:
        """The coordinator's settings."""
        return FlowerCoordinator(
            address=f"127.0.0.1:{self.port}",
            ca=self.folder / "ca.crt",
            certificate=self.folder / "server.pem",
            key=self.folder / "server.key",
            state_dir=self.folder / "coordinator",
            node_keys={name: self.folder / name / "node.key.pub" for name in self.names},
        )

    def start(self, name: str) -> None:
        """Start a site's process."""
        module = "tests.tg_tinker.federated.flower.toy_site_process"
        arguments = [str(self.folder / name), name, public_text(self.key.public_key())]
        with (self.folder / name / "site.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", module, *arguments], stdout=log, stderr=subprocess.STDOUT
            )

    def said(self, name: str) -> str:
        """What a site told its operator."""
        return (self.folder / name / "site.log").read_text(encoding="utf-8")

    def programs(self, of: str = "") -> list[int]:
        """Processes of Flower's programs of this federation, or of one site: the SuperLink names all sites' keys."""
        program = "flower.entry\0supernode" if of else "flower.entry"
        found = []
        for process in Path("/proc").iterdir():
            try:
                line = (process / "cmdline").read_bytes().decode()
            except (OSError, ValueError):
                continue
            if program in line and str(self.folder / of) in line:
                found.append(int(process.name))
        return found

    def stop(self) -> None:
        """End what still runs."""
        for process in self.processes.values():
            process.kill()
            process.wait()
        for pid in self.programs():
            os.kill(pid, signal.SIGKILL)


def wait_until(true: Callable[[], object], timeout_s: float) -> bool:
    """Whether it came true in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.1)
    return bool(true())

"""The whole federation as processes: what a real deployment runs, on loopback addresses of one machine.

Four `tg-tinker serve`; a SuperLink over TLS that lets registered node keys in and nobody else; three
`tg-tinker federated site`, each with a SuperNode. The coordinator's app is this process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tg_tinker.errors import TGTinkerError
from tg_tinker.federated.coordinator_config import CoordinatorConfig
from tg_tinker.federated.flower.certificates import make_authority, make_node_key, make_server_certificate
from tg_tinker.federated.flower.program import free_port
from tg_tinker.federated.flower.superlink import SuperLink
from tg_tinker.federated.result import FederatedResult
from tg_tinker_server.federated_demo.parties import (
    COORDINATOR,
    Party,
    parties,
    public_units,
    write_coordinator,
    write_site,
)
from tg_tinker_server.federated_demo.settings import FederatedDemoSettings
from tg_tinker_server.federated_demo.stage import Work
from tg_tinker_server.federated_demo.supervision import Child, stop_all

_START_S = 120.0
_PATIENCE_S = 10.0
_SERVES = r"tg-tinker serves on (\S+) "


class ProcessStage:
    """A stage of processes; use it in a ``with`` block. However that ends, all of them are gone afterwards.

    Args:
        sites: their names.
        backend: of the servers: "torch", or "bigram" for tests.
    """

    def __init__(
        self, folder: Path, sites: Sequence[str], settings: FederatedDemoSettings, *, backend: str = "torch"
    ) -> None:
        self._folder, self._sites, self._settings, self._backend = folder, tuple(sites), settings, backend
        self._parties: dict[str, Party] = {}
        self._stack = ExitStack()
        self.children: list[Child] = []
        self._superlink: SuperLink | None = None

    def __enter__(self) -> Self:
        try:
            found = parties(self._folder, self._sites)
            servers = {name: self._serve(party) for name, party in found.items()}
            for name, child in servers.items():
                address = child.wait_for(_SERVES, _START_S).group(1)
                self._parties[name] = replace(found[name], address=address)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    @property
    def parties(self) -> Mapping[str, Party]:
        """By name."""
        return self._parties

    def open_sites(self, job: Mapping[str, object]) -> None:
        """Make certificates and node keys, start the SuperLink, start the sites.

        Raises:
            TGTinkerError: one of them does not start; the message names its log.
        """
        coordinator = self._parties[COORDINATOR]
        sites = {name: self._parties[name] for name in self._sites}
        address = f"127.0.0.1:{free_port()}"
        roster = {name: party.public_key() for name, party in sites.items()}
        flower = {"address": address, **certificates(coordinator), "node_keys": node_keys(sites)}
        write_coordinator(coordinator, {**job, "roster": roster}, flower=flower)
        config = CoordinatorConfig.load(coordinator.config)
        assert config.flower is not None
        self._superlink = self._stack.enter_context(SuperLink(config.flower))
        for name, party in sites.items():
            flower = {
                "superlink": address,
                "root_certificates": (coordinator.folder / "ca.crt").absolute(),
                "node_key": "node.key",
            }
            write_site(
                party,
                self._settings,
                coordinator=coordinator.public_key(),
                flower=flower,
                public_units=public_units(party),
            )
            self.children.append(
                Child(
                    f"site {name}",
                    ["federated", "site", "--config", str(party.config)],
                    party.folder / "site.log",
                    {},
                )
            )

    def run(self, work: Work) -> FederatedResult:
        """Be the coordinator's ServerApp of a run that the SuperLink gives out."""
        assert self._superlink is not None, "open_sites comes first"
        config = CoordinatorConfig.load(self._parties[COORDINATOR].config)
        try:
            return self._superlink.run(work, roster=config.job["roster"], key=config.key())
        except TGTinkerError:
            self.check()  # what died says more than what missed it
            raise

    def check(self) -> None:
        """Require that everything runs.

        Raises:
            ServerError: a part died; the message names its log.
        """
        for child in self.children:
            child.check()

    def _serve(self, party: Party) -> Child:
        environ = {
            "TG_TINKER_SERVER_BACKEND": self._backend,
            "TG_TINKER_SERVER_DRAIN_S": "3",
            "TG_TINKER_SERVER_LOG_LEVEL": "warning",
        }
        arguments = ["serve", "--data-dir", str(party.data_dir), "--port", "0"]
        child = Child(f"the server of {party.name}", arguments, party.folder / "server.log", environ)
        self.children.append(child)
        return child

    def _stop(self) -> None:
        try:
            # Sites first: their SuperNodes would miss the SuperLink and say so.
            stop_all(self.children[::-1], patience_s=_PATIENCE_S)
        finally:
            self._stack.close()


def certificates(coordinator: Party) -> dict[str, Any]:
    """The SuperLink's certificate, made where it is missing, as ``[flower]`` of ``coordinator.toml`` names it."""
    folder = coordinator.folder
    if not (folder / "ca.crt").exists():
        make_authority(folder / "ca.crt", folder / "ca.key")
        make_server_certificate(
            folder / "superlink.crt",
            folder / "superlink.key",
            authority=folder / "ca.crt",
            authority_key=folder / "ca.key",
            hosts=["127.0.0.1", "localhost"],
        )
    return {"ca": "ca.crt", "certificate": "superlink.crt", "key": "superlink.key"}


def node_keys(sites: Mapping[str, Party]) -> dict[str, str]:
    """Each SuperNode's public key, made where it is missing."""
    for party in sites.values():
        if not (party.folder / "node.key").exists():
            make_node_key(party.folder / "node.key")
    return {name: str((party.folder / "node.key.pub").absolute()) for name, party in sites.items()}

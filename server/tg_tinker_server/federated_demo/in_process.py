"""The whole federation in one process: servers on loopback sockets, Flower's Grid in memory, the same apps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from tg_tinker.federated.coordinator_config import CoordinatorConfig
from tg_tinker.federated.flower.apps import client_app, server_app
from tg_tinker.federated.flower.in_process import InProcessGrid
from tg_tinker.federated.result import FederatedResult
from tg_tinker.federated.site import Site
from tg_tinker.federated.site_config import SiteConfig
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig
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

_POLL_S = 0.02


class InProcessStage:
    """A stage in this process; use it in a ``with`` block.

    Args:
        sites: their names.
        backend: of the servers: "torch", or "bigram" for tests.
    """

    def __init__(
        self, folder: Path, sites: Sequence[str], settings: FederatedDemoSettings, *, backend: str = "torch"
    ) -> None:
        self._folder, self._sites, self._settings, self._backend = folder, tuple(sites), settings, backend
        self._stack = ExitStack()
        self._grid: InProcessGrid | None = None
        self._parties: dict[str, Party] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for name, party in parties(self._folder, self._sites).items():
                config = ServerConfig.model_validate(
                    {"port": 0, "data_dir": party.data_dir, "log_level": "error", "backend": self._backend}
                )
                server = stack.enter_context(EmbeddedServer(config))
                self._parties[name] = replace(party, address=server.address)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def parties(self) -> Mapping[str, Party]:
        """By name."""
        return self._parties

    def open_sites(self, job: Mapping[str, object]) -> None:
        """Write the configurations, and put each site's app on the Grid."""
        coordinator = self._parties[COORDINATOR]
        sites = {name: self._parties[name] for name in self._sites}
        apps = {}
        for name, party in sites.items():
            write_site(
                party,
                self._settings,
                coordinator=coordinator.public_key(),
                flower={},
                public_units=public_units(party),
            )
            config = SiteConfig.load(party.config)
            service = self._stack.enter_context(config.service())
            apps[name] = client_app(Site(config, service, config.key()).handle)
        roster = {name: party.public_key() for name, party in sites.items()}
        write_coordinator(coordinator, {**job, "roster": roster}, flower={})
        self._grid = self._stack.enter_context(InProcessGrid(apps, workers=len(apps)))

    def run(self, work: Work) -> FederatedResult:
        """Be the coordinator's ServerApp on the Grid."""
        assert self._grid is not None, "open_sites comes first"
        config = CoordinatorConfig.load(self._parties[COORDINATOR].config)
        results: list[FederatedResult] = []
        app = server_app(
            lambda link: results.append(work(link)), roster=config.job["roster"], key=config.key(), poll_s=_POLL_S
        )
        self._grid.serve(app)
        return results[0]

    def check(self) -> None:
        """Nothing here runs by itself."""

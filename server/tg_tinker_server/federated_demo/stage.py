"""Where a federation runs: servers of all parties, and something that carries messages between their apps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from tg_tinker.federated.link import CoordinatorLink
from tg_tinker.federated.result import FederatedResult
from tg_tinker_server.federated_demo.parties import Party

Work = Callable[[CoordinatorLink], FederatedResult]
"""What the coordinator does with a link to the sites."""


class Stage(Protocol):
    """Every party's server runs, and the sites' apps wait for messages."""

    @property
    def parties(self) -> Mapping[str, Party]:
        """By name, with the addresses of their servers."""

    def open_sites(self, job: Mapping[str, object]) -> None:
        """Write the parties' configurations and start the sites' apps.

        Args:
            job: as ``coordinator.toml`` has it, without its roster.
        """

    def run(self, work: Work) -> FederatedResult:
        """Be the coordinator's app.

        Raises:
            TGTinkerError: what ``work`` raises, or a part of the stage died; the message names its log.
        """

    def check(self) -> None:
        """Require that everything runs.

        Raises:
            ServerError: a part died; the message names its log.
        """

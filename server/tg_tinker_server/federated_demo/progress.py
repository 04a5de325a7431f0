"""What the person at the terminal sees while models learn: a line for each round and part, and a live one between."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.text import Text

from tg_tinker import ServiceClient
from tg_tinker.errors import TGTinkerError
from tg_tinker.federated.coordinator import Progress
from tg_tinker_server.demo.report import up
from tg_tinker_server.federated_demo.parties import Party
from tg_tinker_server.federated_demo.settings import FederatedDemoSettings
from tg_tinker_server.federated_demo.state import Arm

_LOOK_S = 0.7


class RoundLines:
    """Prints a federation's progress; its ``show`` is handed to the coordinator.

    Args:
        epsilons: asked after each round: what each site's own ledger shows.
    """

    def __init__(
        self, console: Console, settings: FederatedDemoSettings, epsilons: Callable[[], Mapping[str, float]]
    ) -> None:
        self._console, self._settings, self._epsilons = console, settings, epsilons
        self._said: dict[str, str] = {}

    def show(self, progress: Progress) -> None:
        """Display one event."""
        if progress.what == "joined":
            self._line(f"  {progress.site} joined: its own policy allows the job")
        elif progress.what == "left" and progress.answer is not None:
            self._line(f"  {progress.site} refused: {progress.answer.message}")
        elif progress.what == "asked":
            self._said = {}
        elif progress.what == "answered" and progress.answer is not None:
            kind, why = progress.answer.kind, progress.answer.message
            self._said[progress.site] = "" if kind == "update" else f"{kind.replace('_', ' ')}: {why}"
        elif progress.what == "released":
            self._released(progress)
        elif progress.what in ("skipped", "failed"):
            self._line(f"  round {progress.round} {progress.what}: {progress.message}")

    def _released(self, progress: Progress) -> None:
        epsilons, metrics = self._epsilons(), progress.metrics or {}
        sites = "   ".join(
            f"{site} ✓ ε {up(epsilons[site])}" if not said else f"{site} – {said}"
            for site, said in sorted(self._said.items())
        )
        self._line(
            f"  round {progress.round} of {self._settings.rounds}   {sites}   "
            f"perplexity {metrics.get('perplexity', float('nan')):.1f}"
        )

    def _line(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=not self._console.is_terminal)


def arm_line(arm: Arm, settings: FederatedDemoSettings) -> str:
    """How an arm stands, in one line; "" before its first part."""
    if not arm.points:
        return ""
    point = arm.points[-1]
    ended = "" if point.step >= settings.steps or not arm.finished else "   its budget ended here"
    return (
        f"  {arm.name:<12} step {point.step:3d} of {settings.steps}   ε {up(point.epsilon)}   "
        f"perplexity {point.perplexity:.1f}{ended}"
    )


class Watching:
    """A live line on a terminal with the step at which each party's server is; nothing elsewhere.

    Args:
        parties: whose servers are looked at.
        first: number of steps that are not of this part, by party.
    """

    def __init__(self, console: Console, what: str, parties: Mapping[str, Party], *, steps: int) -> None:
        self._console, self._what, self._parties, self._steps = console, what, parties, steps
        self._status = console.status(f"{what} …") if console.is_terminal else None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watching")

    def __enter__(self) -> Self:
        if self._status is not None:
            self._status.start()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._status is not None:
            self._thread.join()
            self._status.stop()

    def _watch(self) -> None:
        assert self._status is not None
        clients: dict[str, ServiceClient] = {}
        try:
            while not self._stop.wait(_LOOK_S):
                shown = []
                for name, party in self._parties.items():
                    try:
                        if name not in clients:
                            clients[name] = party.client()
                        # The newest run is the one that works; the others are of earlier parts.
                        runs = clients[name].list_training_clients(status="active", limit=1)
                        shown.append(f"{name} {runs[0].step if runs else 0}")
                    except TGTinkerError:
                        shown.append(f"{name} ?")
                self._status.update(f"{self._what}; steps of {self._steps}: {', '.join(shown)}")
        finally:
            for client in clients.values():
                client.close(wait_s=0)

"""A coordinator on a real server, its sites in memory, and a way to kill it at any of its effects."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.tg_tinker.federated.fake_sites import FakeSite
from tests.tg_tinker.federated.jobs import key_of, make_job, names
from tests.tg_tinker.federated.memory_link import MemoryLink
from tg_tinker import ServiceClient
from tg_tinker.federated.coordinator import Coordinator
from tg_tinker.federated.coordinator_config import ADDED, CoordinatorConfig
from tg_tinker.federated.state import StateFolder
from tg_tinker.training_client import TrainingClient

KEY = key_of("coordinator")


class Killed(BaseException):
    """The coordinator's process is gone."""


def config_of(folder: Path, *, job: dict[str, Any], **settings: Any) -> CoordinatorConfig:
    fields = make_job(**job).model_dump(mode="python", exclude=set(ADDED))
    fast = {"join_timeout_s": 0.0, "pause_s": 0.001, **settings}
    where = {
        "identity": folder / "key",
        "state_dir": folder / "state",
        "api_key_env": "NONE",
        "server": "localhost:1",
    }
    return CoordinatorConfig(job=fields, **where, **fast)


def coordinator(
    folder: Path, service: ServiceClient, *, job: dict[str, Any] | None = None, **settings: Any
) -> Coordinator:
    """A coordinator over `make_job(**job)`; other settings are the configuration's, or the coordinator's own."""
    own = {name: settings.pop(name) for name in ("progress", "evaluate", "now", "clock") if name in settings}
    return Coordinator(config_of(folder, job=job or {}, **settings), service, KEY, sleep=lambda _: None, **own)


def fake_sites(count: int = 3, **updates: Any) -> list[FakeSite]:
    """Sites by name; an update may be given for some."""
    return [FakeSite(name, update=updates.get(name.replace("-", "_"))) for name in names(count)]


def link_to(sites: Iterable[FakeSite]) -> MemoryLink:
    return MemoryLink({site.name: lambda request, site=site: site.handle(request) for site in sites})


EFFECTS = (
    (ServiceClient, "create_training_client"),
    (ServiceClient, "delete_training_client"),
    (ServiceClient, "import_weights"),
    (ServiceClient, "note_federation"),
    (TrainingClient, "pull_weights"),
    (TrainingClient, "load_state"),
    (TrainingClient, "add_updates"),
    (TrainingClient, "optim_step"),
    (FakeSite, "handle"),
    (StateFolder, "_write"),
)


@contextmanager
def killing(monkeypatch: Any, *, at: int, after: bool) -> Any:
    """Kill at the ``at``-th effect on the world, before or after it happens. Yields the effects so far."""
    done: list[str] = []

    def wrapped(original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def effect(*arguments: Any, **keywords: Any) -> Any:
            done.append(name)
            mine = len(done) == at
            if (mine and not after) or len(done) > at > 0:  # who is dead does not clean up either
                raise Killed
            found = original(*arguments, **keywords)
            if mine:
                if hasattr(found, "result"):
                    found.result()  # the server has done it, and nobody was told
                raise Killed
            return found

        return effect

    with monkeypatch.context() as patch:
        for owner, name in EFFECTS:
            patch.setattr(owner, name, wrapped(getattr(owner, name), name))
        yield done

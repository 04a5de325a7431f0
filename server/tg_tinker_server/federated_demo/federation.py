"""The federated job itself, on any stage: sites register, the coordinator runs it, released adapters are measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from tg_tinker import TrainingClient
from tg_tinker.federated.coordinator import Coordinator, Progress
from tg_tinker.federated.coordinator_config import CoordinatorConfig
from tg_tinker.federated.result import FederatedResult
from tg_tinker_server.demo.measure import perplexity
from tg_tinker_server.federated_demo.arms import register
from tg_tinker_server.federated_demo.data import FederatedTexts
from tg_tinker_server.federated_demo.parties import COORDINATOR, Party
from tg_tinker_server.federated_demo.settings import DATASET, FederatedDemoSettings
from tg_tinker_server.federated_demo.stage import Stage

T = TypeVar("T")
R = TypeVar("R")


def register_sites(stage: Stage, settings: FederatedDemoSettings, texts: FederatedTexts) -> None:
    """Every site registers its records with its own server, unless it did."""

    def at(name: str, party: Party) -> None:
        with party.client() as service:
            register(service, DATASET, texts.sites[name], settings)

    each(at, {name: stage.parties[name] for name in texts.sites})


def coordinate(
    stage: Stage,
    job: Mapping[str, Any],
    settings: FederatedDemoSettings,
    texts: FederatedTexts,
    *,
    progress: Callable[[Progress], None] = lambda _: None,
) -> FederatedResult:
    """Start the sites' apps and run the job to its end; each released adapter is measured on the held-out texts.

    Args:
        job: as ``coordinator.toml`` has it, without its roster.

    Raises:
        TGTinkerError: as a coordinator may meet.
    """
    stage.open_sites(job)
    config = CoordinatorConfig.load(stage.parties[COORDINATOR].config)
    with config.service() as service:
        reader = service.create_training_client(settings.reader())
        coordinator = Coordinator(
            config,
            service,
            config.key(),
            progress=progress,
            evaluate=lambda released: {"perplexity": measured(reader, released.artifact_id, settings, texts)},
        )
        result = stage.run(coordinator.run)
        service.delete_training_client(reader.id)
    return result


def measured(
    reader: TrainingClient, artifact_id: str, settings: FederatedDemoSettings, texts: FederatedTexts
) -> float:
    """Perplexity of an artifact on the held-out texts."""
    reader.load_state(artifact_id, optimizer=False)
    return perplexity(reader, texts.held_out, batch_size=settings.eval_batch_size)


def each(work: Callable[[str, T], R], over: Mapping[str, T]) -> dict[str, R]:
    """Do something for every party at once; by name."""
    with ThreadPoolExecutor(len(over)) as pool:
        futures = {name: pool.submit(work, name, value) for name, value in over.items()}
        return {name: future.result() for name, future in futures.items()}

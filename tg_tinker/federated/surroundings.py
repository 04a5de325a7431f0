"""What surrounds a coordinator: its server, its key, the clock, and whoever watches it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tg_tinker.federated.coordinator_config import CoordinatorConfig
from tg_tinker.federated.rounds import Answer
from tg_tinker.service_client import ServiceClient


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Something happened, for whoever runs the coordinator. Not to be published where sites are protected.

    Attributes:
        what: "joined", "left", "asked", "answered", "released", "skipped", "finished" or "failed".
        site: whom it is about; empty for all.
        answer: with "left" and "answered".
        metrics: with "released": of the evaluation.
        message: why, with "skipped" and "failed".
    """

    what: str
    round: int = 0
    attempt: int = 0
    site: str = ""
    answer: Answer | None = None
    metrics: Mapping[str, float] | None = None
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Released:
    """The adapter after a round, for an evaluation on public data; round 0 is the first adapter."""

    round: int
    artifact_id: str
    weights: Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a run needs from outside; see ``Coordinator``."""

    service: ServiceClient
    key: Ed25519PrivateKey
    config: CoordinatorConfig
    progress: Callable[[Progress], None]
    evaluate: Callable[[Released], Mapping[str, float]] | None
    now: Callable[[], datetime]
    clock: Callable[[], float]
    sleep: Callable[[float], None]

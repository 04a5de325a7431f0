"""Going on from the last checkpoint when a run is lost; off unless asked for.

A server that restarts loses nothing and needs none of this: the client sends again what was not durable, and no step
is run twice. This is for runs that are gone for good. Steps that are trained again are charged again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from tg_tinker.errors import (
    InvalidRequestError,
    LogVerificationError,
    ResourceNotFoundError,
    ServerError,
    TGTinkerError,
)
from tg_tinker.service_client import ServiceClient
from tg_tinker.training_client import TrainingClient
from tg_tinker.types import ArtifactInfo

T = TypeVar("T")
_log = logging.getLogger("tg_tinker")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """A run that goes on as another.

    Attributes:
        run_id: of the run that was lost.
        client: of the one that goes on.
        checkpoint: where it began.
        attempt: counted from 1.
    """

    run_id: str
    client: TrainingClient
    checkpoint: ArtifactInfo
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryPolicy:
    """When and how to go on.

    Attributes:
        enabled: off, because under differential privacy the steps since the checkpoint are paid for twice.
        max_attempts: over the life of one ``Recovery``.
        backoff_s, longest_backoff_s: wait before an attempt, doubled each time.
        poll_s: how often ``Recovery.watch`` asks.
        strategy: "latest": the newest checkpoint of the run, by whatever name.
        restore_optimizer: go on with its optimizer, too.
        on_recovery, on_failure: told of what became of it.

    Raises:
        InvalidRequestError: naming the value that cannot be.
    """

    enabled: bool = False
    max_attempts: int = 3
    backoff_s: float = 5.0
    longest_backoff_s: float = 60.0
    poll_s: float = 30.0
    strategy: Literal["latest"] = "latest"
    restore_optimizer: bool = True
    on_recovery: Callable[[Recovered], None] | None = None
    on_failure: Callable[[str, TGTinkerError], None] | None = None

    def __post_init__(self) -> None:
        for name, holds, constraint in (
            ("max_attempts", self.max_attempts >= 1, "1 or more"),
            ("backoff_s", self.backoff_s >= 0, "0 or more"),
            ("longest_backoff_s", self.longest_backoff_s >= self.backoff_s, "at least backoff_s"),
            ("poll_s", self.poll_s > 0, "above 0"),
            ("strategy", self.strategy == "latest", "latest"),
        ):
            if not holds:
                raise InvalidRequestError(
                    f"{name}={getattr(self, name)!r} must be {constraint}", field=name, constraint=constraint
                )


class Recovery:
    """Runs a training function, and again from the last checkpoint when the run is lost.

    Attributes:
        client: the run as it stands; another one after a recovery.
    """

    def __init__(self, service: ServiceClient, client: TrainingClient, policy: RecoveryPolicy) -> None:
        self.client = client
        self._service, self._policy = service, policy
        self._attempts = 0
        self._checkpoint: ArtifactInfo | None = None

    def run(self, train: Callable[[TrainingClient], T]) -> T:
        """Call ``train(client)``; it begins at ``client.step`` and saves checkpoints as it goes.

        Raises:
            TGTinkerError: what ``train`` raised, where a checkpoint cannot help: a refused request, an exhausted
                budget, a log that is not what it was; or where there is none, or no attempt is left.
        """
        while True:
            try:
                return train(self.client)
            except TGTinkerError as e:
                if not self._policy.enabled or isinstance(e, LogVerificationError) or not self._lost(e):
                    raise
                self._recover(e)

    def watch(self, stop: threading.Event) -> bool:
        """Ask every ``poll_s`` seconds how the run stands; returns when it has failed (True) or ``stop`` is set."""
        while not stop.wait(self._policy.poll_s):
            try:
                if self.client.status == "failed":
                    return True
            except ResourceNotFoundError:
                return True
            except ServerError:
                continue  # away for a while; whoever waits for a result hears of it
        return False

    def _lost(self, error: TGTinkerError) -> bool:
        """Whether the run, or the way to it, is gone: a refused request is no reason to begin again."""
        if isinstance(error, ServerError):
            return True
        try:
            return self.client.status == "failed"
        except (ResourceNotFoundError, ServerError):
            return True

    def _recover(self, error: TGTinkerError) -> None:
        lost, policy = self.client, self._policy
        while self._attempts < policy.max_attempts:
            self._attempts += 1
            time.sleep(min(policy.longest_backoff_s, policy.backoff_s * 2.0 ** (self._attempts - 1)))
            try:
                checkpoint = self._checkpoint = self._latest(lost.id)
                if checkpoint is None:
                    break
                create = (
                    self._service.create_training_client_from_state_with_optimizer
                    if policy.restore_optimizer and checkpoint.optimizer
                    else self._service.create_training_client_from_state
                )
                self.client = create(checkpoint.path)
            except ServerError as e:
                _log.warning("attempt %d to recover %s failed: %s", self._attempts, lost.id, e.message)
                continue
            _log.warning("%s was lost; %s goes on from %s", lost.id, self.client.id, checkpoint.path)
            lost.close(wait_s=0.0)
            if policy.on_recovery is not None:
                policy.on_recovery(
                    Recovered(run_id=lost.id, client=self.client, checkpoint=checkpoint, attempt=self._attempts)
                )
            return
        if policy.on_failure is not None:
            policy.on_failure(lost.id, error)
        raise error

    def _latest(self, run_id: str) -> ArtifactInfo | None:
        """The run's own, or the one that it began with."""
        own = (a for a in self._service.list_artifacts(run_id) if a.kind == "weights")
        return next(own, self._checkpoint)

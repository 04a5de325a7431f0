"""The coordinator of one job: it prepares the job, runs it over any link, and goes on with it after a kill.

A round is released when its adapter is an encrypted artifact at the coordinator's server and ``state.json`` names
it. Killed at any point before, a coordinator that is started again repeats the round from the same adapter, and sites
hand out the update that they stored. Under site-level privacy the repeated round is charged again, because its first
result may have been seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tg_tinker.errors import FederationRefusedError, InvalidRequestError
from tg_tinker.federated.adapter_store import NOTHING_SPENT, AdapterStore, Weights
from tg_tinker.federated.aggregation import Moments, check_robust
from tg_tinker.federated.coordinator_config import CoordinatorConfig
from tg_tinker.federated.job import Job
from tg_tinker.federated.job_run import JobRun
from tg_tinker.federated.link import CoordinatorLink
from tg_tinker.federated.masking import MaskingSetting
from tg_tinker.federated.result import FederatedResult
from tg_tinker.federated.rounds import Course
from tg_tinker.federated.site_privacy import check_feasible, check_left, trained_sizes
from tg_tinker.federated.state import Saved, StateFolder
from tg_tinker.federated.surroundings import Progress, Released, Surroundings
from tg_tinker.federated.updates import weights_digest
from tg_tinker.service_client import ServiceClient

__all__ = ["Coordinator", "Progress", "Released"]

_NO_DIGEST = "0" * 64


class Coordinator:
    """Runs the job of a configuration.

    Args:
        service: a client of the coordinator's own server, with the roles trainer, exporter and auditor.
        key: the coordinator's identity; sites know its public half.
        progress: called as things happen, for the operator alone.
        evaluate: called with each released adapter; what it returns stands in the result, so its data must be public.
        now, clock, sleep: time of day, seconds that never go back, and waiting.
    """

    def __init__(
        self,
        config: CoordinatorConfig,
        service: ServiceClient,
        key: Ed25519PrivateKey,
        *,
        progress: Callable[[Progress], None] = lambda _: None,
        evaluate: Callable[[Released], Mapping[str, float]] | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._config, self._service, self._key, self._now = config, service, key, now
        self._around = Surroundings(
            service=service,
            key=key,
            config=config,
            progress=progress,
            evaluate=evaluate,
            now=now,
            clock=clock,
            sleep=sleep,
        )

    def prepare(self) -> Job:
        """The whole job. Its first adapter is drawn by the server, once, and kept; no site is asked yet.

        Raises:
            FederationRefusedError: the job cannot work: "hopeless", "too_few_sites", "masking" or "expired".
            InvalidRequestError: a setting cannot be, or the state folder holds another job.
        """
        with StateFolder(self._config.state_dir) as folder:
            return self._opened(folder)[0].job

    def run(self, link: CoordinatorLink) -> FederatedResult:
        """Run the job to its end, or go on with it from its last released round.

        Returns:
            How it ended. After "failed", whose reason stands in it, the call may be made again: it tries again.

        Raises:
            FederationRefusedError: see ``prepare``.
            ServerError: the coordinator's server cannot be reached; nothing is lost, call again.
        """
        return self._on(link).to_the_end()

    def finish(self, link: CoordinatorLink) -> FederatedResult:
        """Give up a job that cannot go on: sites state what they spent, and take no more of its rounds."""
        return self._on(link).given_up()

    def _on(self, link: CoordinatorLink) -> JobRun:
        folder = StateFolder(self._config.state_dir)
        try:
            return JobRun(self._around, folder, link, *self._opened(folder))
        except BaseException:
            folder.close()
            raise

    def _opened(self, folder: StateFolder) -> tuple[Saved, Moments, Weights]:
        known = folder.load()
        if known is None:
            return self._begun(folder)
        saved, moments = known
        if not self._config.is_of(saved.job, self._key):
            raise InvalidRequestError(
                f"the state in {folder.path} is of another job than the configuration or of another key: give this "
                "job a folder of its own, or put the configuration back as it was",
                field="state_dir",
                constraint="of this job",
            )
        weights = AdapterStore(self._service, saved.job).load(saved.adapter)
        if weights_digest(weights) != saved.adapter_digest:
            raise InvalidRequestError(
                f"the artifact {saved.adapter} is not the adapter that {folder.path} names: the server's database "
                "and the state folder are not of the same time",
                field="state_dir",
                constraint="of this server",
            )
        return saved, moments, weights

    def _begun(self, folder: StateFolder) -> tuple[Saved, Moments, Weights]:
        draft = self._config.job_with(coordinator=self._key, adapter_digest=_NO_DIGEST)
        if self._now() >= draft.expires:
            raise FederationRefusedError(f"the job expired at {draft.expires.isoformat()}", reason="expired")
        check_robust(draft)
        if draft.masking is not None:
            MaskingSetting.of(draft)
        weights = AdapterStore(self._service, draft).draw()
        job = draft.model_copy(update={"adapter_digest": weights_digest(weights)})
        if job.sites is not None:
            check_feasible(job, trained_sizes(job, weights))
            check_left(job, self._service)
        course = Course(
            rounds=job.rounds,
            roster=tuple(sorted(job.roster)),
            quorum=job.min_sites,
            min_updates=0 if job.sites is not None else job.min_sites,
            max_attempts=self._config.max_attempts,
            public=job.sites is None,
        )
        saved = Saved(
            job=job,
            course=course,
            adapter=AdapterStore(self._service, job).keep(weights, 0, NOTHING_SPENT),
            adapter_digest=job.adapter_digest,
            bound=job.sites.clip if job.sites is not None else None,
        )
        return folder.save(saved), Moments(), weights

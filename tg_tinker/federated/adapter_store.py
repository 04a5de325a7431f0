"""The job's adapter at the coordinator's own server: drawn once, kept as an encrypted artifact after every round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from tg_tinker.federated.job import Job
from tg_tinker.service_client import ServiceClient
from tg_tinker.training_client import TrainingClient
from tg_tinker.types import TrainingConfig, WeightsSource

Weights = dict[str, npt.NDArray[np.float32]]
Promise = tuple[float, float, str]
"""Epsilon, delta, and the unit that they protect."""
NOTHING_SPENT: Promise = (0.0, 1e-9, "datum")
"""Of weights that no data went into."""


class AdapterStore:
    """Artifacts of one job's adapter."""

    def __init__(self, service: ServiceClient, job: Job) -> None:
        self._service, self._job = service, job

    def draw(self) -> Weights:
        """A fresh adapter from the job's seed, as the model's own initialisation has it."""
        with self._run() as run:
            return run.pull_weights().tensors

    def keep(self, weights: Mapping[str, npt.NDArray[np.float32]], round_: int, promise: Promise) -> str:
        """Make an encrypted artifact of the adapter after a round; its id.

        Args:
            promise: what the job has promised up to this round; stays with everything that is trained from it.
        """
        job, (epsilon, delta, unit) = self._job, promise
        source = WeightsSource(job=job.digest(), round=round_, epsilon=epsilon, delta=delta, unit=unit)
        info = self._service.import_weights(
            weights,
            base_model=job.base_model,
            lora_config=job.adapter,
            step=round_ * job.local_steps,
            source=source,
        )
        return info.artifact_id

    def load(self, artifact_id: str) -> Weights:
        """The adapter in an artifact, bit for bit."""
        with self._run() as run:
            run.load_state(artifact_id, optimizer=False)
            return run.pull_weights().tensors

    @contextmanager
    def _run(self) -> Iterator[TrainingClient]:
        job = self._job
        config = TrainingConfig(
            model_ref=job.base_model,
            lora_config=job.adapter,
            max_sequence_length=job.max_sequence_length,
            batch_size=1,
            seed=job.seed,
            metadata={"federated_job": job.job_id},
        )
        run = self._service.create_training_client(config)
        try:
            yield run
        finally:
            run.close(wait_s=0.0)
            self._service.delete_training_client(run.id)

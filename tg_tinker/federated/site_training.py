"""One site's part of a round: global weights go into its own server, local steps follow, the difference comes out.

A process may die anywhere in it. What was stored is never trained or paid for again; what was not goes on from where
the server stands, and only where the run is known to hold this round's weights.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

from tg_tinker.errors import (
    DPBudgetExceededError,
    FederationRefusedError,
    InvalidRequestError,
    ResourceNotFoundError,
    ServerError,
)
from tg_tinker.federated.job import Job
from tg_tinker.federated.site_memory import MARK, charges_of_job, history_of, mark_of, runs_of
from tg_tinker.federated.site_state import Arrays, JobRecord, SiteState
from tg_tinker.federated.updates import Factor, Weights, check_update, layout, subtract, weights_digest
from tg_tinker.service_client import ServiceClient
from tg_tinker.training_client import TrainingClient
from tg_tinker.types import DPConfig, LoRAConfig, OptimizerConfig, TrainingConfig
from tg_tinker.types.federation import WeightsSource
from tg_tinker.wire.calls import Position

UNPROTECTED_BOUND = 1e9
"""Stands for no bound on a unit's contribution, where a job trains without privacy of records."""
_LISTED = 1000  # newest runs that are looked through for one that a crash left without a note


@dataclass(frozen=True, slots=True)
class LocalTraining:
    """Training for one job on the site's own server.

    Attributes:
        record: of the job, as it was when the message arrived.
    """

    service: ServiceClient
    state: SiteState
    record: JobRecord
    dataset_id: str

    @property
    def job(self) -> Job:
        """What was agreed on."""
        return self.record.job

    def update(self, round_: int, weights: Weights) -> Arrays:
        """The update of a round: stored before, or trained now.

        Args:
            weights: the whole global adapter.

        Raises:
            FederationRefusedError: "wrong_round": the round began with other weights, is over or does not exist;
                "bad_update": these are not weights of the adapter; "policy": no budget is left.
        """
        digest, base = self.record.digest, weights_digest(weights)
        known = self.state.round(digest, round_)
        if known is not None and known.base != base:
            raise _wrong(f"round {round_} began with another global model at this site, and is trained only once")
        if known is not None and known.phase in ("trained", "told"):
            return self.state.update(digest, round_)
        factor = self.job.frozen_factor(round_)
        first, last = (round_ - 1) * self.job.local_steps, round_ * self.job.local_steps
        if known is None:
            charges = self._begin(round_, weights, base)
            run = self._run(factor)
            self._load(run, round_, weights, first)
        else:
            run = self._run(factor)
            self._load(run, round_, weights, first)
            self._go_on(run, round_, first, last)
            charges = self._count()
        for _ in range(run.get_info().step, last):
            self._require_allowance(charges + 1)
            charges += 1
            self._step(run)
        # A step that a restarted server had to make again was charged each time: what left must fit the allowance.
        charges = self._count()
        self._require_allowance(charges)
        after = run.pull_weights()
        if after.step != last:
            raise ServerError(f"run {run.id} stands at step {after.step}, not {last}: somebody else drives it")
        self.state.store_update(digest, round_, subtract(after.tensors, weights, factor), charges)
        return self.state.update(digest, round_)

    def close(self) -> None:
        """Let what is under way come to its end, then free what the job holds on the server. The ledger stays.

        Nothing is charged to the job from here on.
        """
        for artifact_id in self.state.artifacts(self.record.digest):
            self._delete(artifact_id)
        for run in self._runs():
            self._settle(run)
            run.unload_model()

    def _begin(self, round_: int, weights: Weights, base: str) -> int:
        """Note a new round; how many charges the job has made before it."""
        if not self.record.last_round < round_ <= self.job.rounds:
            raise _wrong(
                f"round {round_} cannot begin: the last one at this site was {self.record.last_round}, of "
                f"{self.job.rounds}"
            )
        if round_ == 1 and base != self.job.adapter_digest:
            raise FederationRefusedError(
                "round 1 must begin with the adapter whose digest the job names", reason="bad_update"
            )
        shapes = self.record.layout
        if shapes is None:
            shapes = layout(self._run(self.job.frozen_factor(round_)).pull_weights().tensors)
            self.state.set_layout(self.record.digest, shapes)
        check_update(weights, shapes, None, what="the global model")
        charges = self._count()
        if self.record.counted and charges > self.record.charges:
            raise FederationRefusedError(
                "steps were taken for this job that this site does not remember: an old copy of its state folder was "
                "put back. Nothing is trained twice; start a new job",
                reason="policy",
            )
        self._require_allowance(charges + self.job.local_steps)
        self.state.begin_round(self.record.digest, round_, base)
        return charges

    def _load(self, run: TrainingClient, round_: int, weights: Weights, step: int) -> None:
        """Bring the global weights into the run, unless it is known to hold them."""
        digest = self.record.digest
        known = self.state.round(digest, round_)
        assert known is not None
        artifact_id, phase = known.artifact_id, known.phase
        if phase == "begun":
            info = self.service.import_weights(
                dict(weights),
                base_model=self.job.base_model,
                lora_config=run.config.lora_config,
                step=step,
                source=self._source(round_),
            )
            artifact_id, phase = info.artifact_id, "imported"
            self.state.set_phase(digest, round_, "imported", artifact_id=artifact_id)
        if phase == "imported":
            run.load_state(artifact_id, optimizer=False)
            self.state.set_phase(digest, round_, "loaded", artifact_id=artifact_id)
        if artifact_id:
            self._delete(artifact_id)
            self.state.set_phase(digest, round_, "loaded")

    def _go_on(self, run: TrainingClient, round_: int, first: int, last: int) -> None:
        """After a crash: step what was drawn and not stepped, on weights that are this round's."""
        step = run.get_info().step
        if not first <= step <= last:
            self.state.set_phase(self.record.digest, round_, "begun")
            raise ServerError(
                f"run {run.id} stands at step {step}, outside of {first} to {last}: an old state of the server was "
                "restored, or somebody else drives the run; the next request loads the round's weights again"
            )
        if step < last:
            self._require_allowance(self._count() + 1)
            try:
                self._optim_step(run)
            except InvalidRequestError as e:
                if e.field != "optim_step":
                    raise
                # Nothing was drawn, or not the whole batch: the server dropped it, and the refusal cost nothing.

    def _step(self, run: TrainingClient) -> None:
        """One local step."""
        try:
            run.forward_backward(dataset=self.dataset_id).result()
        except DPBudgetExceededError as e:
            raise _exhausted() from e
        self._optim_step(run)

    def _optim_step(self, run: TrainingClient) -> None:
        try:
            run.optim_step(apply_dp_noise=self.job.records is not None).result()
        except DPBudgetExceededError as e:
            raise _exhausted() from e

    def _settle(self, run: TrainingClient) -> None:
        """Wait for what an earlier process left in the run's queue: it may be charged after we look."""
        last = run.get_info().next_seq - 1
        try:
            future = self.service.get_future(Position(run_id=run.id, seq=last).future_id)
        except ResourceNotFoundError:
            return  # there was none, or it ended too long ago to be kept
        if not future.wait(self.job.round_timeout_s):
            raise ServerError(f"run {run.id} is still at what it was asked before; ask again when it is done")

    def _count(self) -> int:
        """Charges of the job by the ledger, when nothing is under way.

        Raises:
            ServerError: they are fewer than the site knows of.
        """
        if self.job.records is None:
            return 0
        for run in self._runs():
            self._settle(run)
        history = history_of(self.service, self.dataset_id)
        charges = len(charges_of_job(self.service, self.state, self.record, history))
        require_all(charges, self.record.charges)
        return charges

    def _require_allowance(self, charges: int) -> None:
        if self.job.records is not None and charges > self.job.total_steps:
            raise FederationRefusedError(
                "the steps that the job's epsilon was planned for are used up at this site: some were paid for and "
                "lost in a failure, and nothing is given back",
                reason="policy",
            )

    # The run.

    def _runs(self) -> list[TrainingClient]:
        """Every training client of the job that is still there."""
        found = []
        for run_id in sorted(runs_of(self.service, self.state, self.record.digest)[0]):
            with contextlib.suppress(ResourceNotFoundError):  # deleted: nothing of it is under way
                found.append(self.service.get_training_client(run_id))
        return found

    def _run(self, factor: Factor | None) -> TrainingClient:
        """The training client of a factor; one for all rounds that freeze it."""
        digest, key = self.record.digest, factor or ""
        run_id = self.state.run_id(digest, key)
        if run_id:
            return self.service.get_training_client(run_id)
        mark = mark_of(digest, key)
        run = self._unnoted(mark) if run_id == "" else None
        if run is None:
            self.state.set_run_id(digest, key, "")
            run = self.service.create_training_client(self._config(factor, mark))
        self.state.set_run_id(digest, key, run.id)
        return run

    def _unnoted(self, mark: str) -> TrainingClient | None:
        """A run that was made before a crash and not noted."""
        for info in self.service.list_training_clients(status="active", limit=_LISTED):
            if info.step == 0 and info.metadata.get(MARK) == mark:
                return self.service.get_training_client(info.id)
        return None

    def _config(self, factor: Factor | None, mark: str) -> TrainingConfig:
        job = self.job
        optimizer = job.optimizer.model_dump()
        if job.strategy.name == "fedprox":
            optimizer["proximal_mu"] = job.strategy.proximal_mu
        return TrainingConfig(
            model_ref=job.base_model,
            lora_config=LoRAConfig.model_validate({**job.adapter.model_dump(), "frozen_factor": factor}),
            optimizer=OptimizerConfig.model_validate(optimizer),
            dp_config=self._dp_config(),
            batch_size=job.batch_size,
            max_sequence_length=job.max_sequence_length,
            max_steps=job.total_steps,
            seed=job.seed,
            metadata={MARK: mark},
        )

    def _dp_config(self) -> DPConfig:
        dataset, records = self.service.get_dataset(self.dataset_id), self.job.records
        if records is None:
            # Steps are released as they are, and the ledger says that epsilon is infinite. Without a promise of its
            # own the run may begin with weights that promise nothing either, which "public" permits.
            return dataset.dp_config(
                max_grad_norm=UNPROTECTED_BOUND,
                allow_unnoised_steps=True,
                initial_weights="public",
                diagnostics="off",
            )
        assert self.record.noise_multiplier is not None
        return dataset.dp_config(
            noise_multiplier=self.record.noise_multiplier,
            max_grad_norm=records.max_grad_norm,
            diagnostics="off",
        )

    def _source(self, round_: int) -> WeightsSource:
        """What the job has promised to everybody in its data before this round, as it says itself."""
        records, times = self.job.records, 1
        epsilon, delta, unit = math.inf, 1e-5, "datum"
        if records is not None:
            times = len(self.job.roster) if records.people == "shared" else 1
            epsilon, delta, unit = records.target_epsilon, records.target_delta, records.unit
        return WeightsSource(
            job=self.record.digest,
            round=round_ - 1,
            epsilon=0.0 if round_ == 1 else times * epsilon,
            delta=min(times * delta, 0.5),
            unit=unit,
        )

    def _delete(self, artifact_id: str) -> None:
        try:
            self.service.delete_artifact(artifact_id)
        except ResourceNotFoundError:
            return  # deleted before a crash


def require_all(charges: int, known: int) -> None:
    """Refuse a ledger that holds fewer charges of a job than the site knows of.

    Raises:
        ServerError: for the operator.
    """
    if charges < known:
        raise ServerError(
            f"the ledger holds {charges} charges of the job and this site knows of {known}: an old state of the "
            "server was put back. Nothing is trained or signed on it; restore the newest one"
        )


def _wrong(message: str) -> FederationRefusedError:
    return FederationRefusedError(message, reason="wrong_round")


def _exhausted() -> FederationRefusedError:
    return FederationRefusedError(
        "the privacy budget of this site's data does not allow another step", reason="policy"
    )

"""What a site agrees to, written down by its operator before anybody asks. It is checked before data is touched.

Everything here is decided from the job and the clock alone: neither data nor its size is looked at. What the rest of
the site does with the size of its data rests on a public one, since sizes could be found out by asking.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from tg_tinker.errors import FederationRefusedError, InvalidRequestError
from tg_tinker.federated.job import Job, PublicKey, SiteName

LoRASharing = Literal["both", "freeze_a", "alternate"]


class SitePolicy(BaseModel):
    """The rules of one site: the table ``[policy]`` of its ``site.toml``.

    Attributes:
        coordinator: the one public key whose jobs are taken.
        base_models: the base models that may be trained.
        jobs: ids of the jobs that are taken; empty takes any of the coordinator's.
        max_record_tokens: public: no record of the site is longer. A job with a smaller ``max_sequence_length`` is
            refused, whatever the records are; otherwise asking for many lengths would tell the longest record's.
        public_units: public: the site has at least so many privacy units. Noise, what batch fits and the stated
            epsilon are computed as if it had no more, which is never too little; the site's own ledger keeps the
            true rate. Default: the largest power of two that is not above the registered number.
        max_rounds: most rounds of a job.
        max_local_steps: most optimizer steps in a round.
        max_epsilon: largest epsilon that a job may spend here, over all its rounds.
        max_delta: largest delta that it may be stated at.
        min_noise_multiplier: noise is never less than this, however much the target would allow.
        privacy_unit: what one epsilon must protect.
        min_sites: an aggregate of fewer sites than this is not contributed to.
        require_masking: whether the coordinator may see this site's update by itself.
        require_record_privacy: whether jobs without DP-SGD inside the site are refused. Without it the dataset
            must have been registered without a target, and its epsilon is infinite from then on.
        federated_lora: the ways of averaging that are taken.
        disclose_accounting: whether the closing statement tells noise and sampling rate, so that others can compute
            epsilon again. The rate is that of ``public_units``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    coordinator: PublicKey
    base_models: tuple[str, ...] = Field(min_length=1)
    max_record_tokens: int = Field(ge=2)
    public_units: int | None = Field(None, ge=1)
    jobs: tuple[SiteName, ...] = ()
    max_rounds: int = Field(100, ge=1)
    max_local_steps: int = Field(100, ge=1)
    max_epsilon: float = Field(8.0, gt=0, allow_inf_nan=False)
    max_delta: float = Field(1e-5, gt=0, lt=1)
    min_noise_multiplier: float = Field(0.3, ge=0, allow_inf_nan=False)
    privacy_unit: Literal["datum", "group", "pair", "user", "sequence"] = "datum"
    min_sites: int = Field(1, ge=1)
    require_masking: bool = False
    require_record_privacy: bool = True
    federated_lora: tuple[LoRASharing, ...] = Field(("both", "freeze_a", "alternate"), min_length=1)
    disclose_accounting: bool = False

    def check(self, job: Job, now: datetime) -> None:
        """Refuse a job that breaks a rule; one message names every rule that it breaks, its value and the limit.

        Args:
            now: the current time, with a time zone.

        Raises:
            FederationRefusedError: reason "expired" if it is only late; else "policy".
        """
        breaches = list(self._breaches(job))
        late = now >= job.expires
        if late:
            breaches.append(f"it expired at {job.expires.isoformat()}")
        if breaches:
            raise FederationRefusedError(
                f"the policy of this site refuses job {job.job_id!r}: " + "; ".join(breaches),
                reason="expired" if late and len(breaches) == 1 else "policy",
            )

    def units_told(self, registered: int) -> int:
        """The public number of units of a dataset that has so many.

        Raises:
            InvalidRequestError: the policy says more than there are. It is for the operator: it holds the number.
        """
        if self.public_units is None:
            return 1 << (registered.bit_length() - 1)
        if self.public_units > registered:
            raise InvalidRequestError(
                f"the policy says public_units = {self.public_units}, and the dataset was registered with "
                f"{registered}; with fewer the stated epsilon would be too small",
                field="public_units",
                constraint="at most the registered number of privacy units",
            )
        return self.public_units

    def _breaches(self, job: Job) -> Iterator[str]:
        if job.coordinator != self.coordinator:
            yield "its coordinator is not the one whose key the policy names"
        if self.jobs and job.job_id not in self.jobs:
            yield f"job_id {job.job_id!r} is not among the jobs that were agreed on"
        if job.base_model not in self.base_models:
            yield f"base_model {job.base_model!r} is not one of {', '.join(map(repr, self.base_models))}"
        if job.federated_lora not in self.federated_lora:
            yield f"federated_lora {job.federated_lora!r} is not one of {', '.join(map(repr, self.federated_lora))}"
        if job.rounds > self.max_rounds:
            yield f"rounds {job.rounds} is more than max_rounds {self.max_rounds}"
        if job.local_steps > self.max_local_steps:
            yield f"local_steps {job.local_steps} is more than max_local_steps {self.max_local_steps}"
        if job.max_sequence_length < self.max_record_tokens:
            yield (
                f"max_sequence_length {job.max_sequence_length} is less than max_record_tokens "
                f"{self.max_record_tokens}: longer records would not fit"
            )
        if job.min_sites < self.min_sites:
            yield f"min_sites {job.min_sites} is fewer than the {self.min_sites} that the policy requires"
        if job.masking is None and self.require_masking:
            yield "it has no masking, which the policy requires: the coordinator would see this site's update"
        yield from self._record_breaches(job)

    def _record_breaches(self, job: Job) -> Iterator[str]:
        records = job.records
        if records is None:
            if self.require_record_privacy:
                yield "it trains without privacy of records, which the policy requires"
            return
        if records.target_epsilon > self.max_epsilon:
            yield f"target_epsilon {records.target_epsilon:g} is more than max_epsilon {self.max_epsilon:g}"
        if records.target_delta > self.max_delta:
            yield f"target_delta {records.target_delta:g} is more than max_delta {self.max_delta:g}"
        if records.unit != self.privacy_unit:
            yield f"it protects each {records.unit!r}, and the policy requires {self.privacy_unit!r}"

"""Whether a site takes a job: its policy, the roster, what its server offers, what its data's budget can carry."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from tg_tinker.errors import FederationRefusedError, InvalidRequestError
from tg_tinker.federated.job import Job
from tg_tinker.federated.masking import MaskingSetting
from tg_tinker.federated.site_budget import (
    Histogram,
    Holding,
    as_public,
    charges_of,
    check_unprotected,
    merged,
    remaining,
    solve_noise,
)
from tg_tinker.federated.site_config import SiteConfig
from tg_tinker.federated.site_memory import history_of, knows
from tg_tinker.federated.site_state import SiteState
from tg_tinker.ledger.releases import histogram
from tg_tinker.service_client import ServiceClient


def read_job(facts: Mapping[str, Any], digest: str) -> Job:
    """The job in a request to join.

    Raises:
        FederationRefusedError: reason "policy": it is no job, or not the one that the message is about.
    """
    try:
        job = Job.model_validate(facts.get("job"))
    except ValidationError as e:
        errors = [
            f"{'.'.join(map(str, error['loc'])) or 'the job'}: {error['msg'].removeprefix('Value error, ')}"
            for error in e.errors(include_input=False, include_url=False)
        ]
        raise _refused(f"this site does not understand the job: {'; '.join(errors)[:1000]}") from None
    if job.digest() != digest:
        raise _refused("the job is not the one that the message names: their digests differ")
    return job


def agreed_terms(
    job: Job, *, config: SiteConfig, service: ServiceClient, state: SiteState, public_key: str, now: datetime
) -> tuple[float | None, int]:
    """The noise multiplier to train the job with, ``None`` where it has no privacy of records, and the public number
    of units that it was computed from. No data is touched.

    Args:
        public_key: of this site.

    Raises:
        FederationRefusedError: "policy", "expired", "unknown_site", or what masking cannot do.
    """
    config.policy.check(job, now)
    if job.roster.get(config.site) != public_key:
        raise FederationRefusedError(
            f"the job's roster does not have site {config.site!r} with the public key of this site",
            reason="unknown_site",
        )
    earlier = state.digest_of(job.job_id)
    if earlier not in (None, job.digest()):
        raise _refused(
            f"this site agreed to another job under job_id {job.job_id!r}, and one name is for one job: give the new "
            "one a job_id of its own, which the site's policy takes"
        )
    if knows(service, state, job.digest()):
        raise _refused(
            "this site's state folder is not the one that agreed to the job, which may have trained already; start a "
            "new job under a new job_id"
        )
    if job.masking is not None:
        MaskingSetting.of(job)
    if job.base_model not in {model.name for model in service.get_server_capabilities().models}:
        raise _refused(f"the server of this site does not offer the base model {job.base_model!r}")
    holding = _holding(job, config=config, service=service, state=state, now=now)
    if job.records is None:
        check_unprotected(job, holding)
        return None, holding.public_units
    policy = config.policy
    noise = solve_noise(job, holding, floor=policy.min_noise_multiplier, max_epsilon=policy.max_epsilon)
    return noise, holding.public_units


def _holding(job: Job, *, config: SiteConfig, service: ServiceClient, state: SiteState, now: datetime) -> Holding:
    """The site's dataset, and what other jobs may still spend of it."""
    units = service.get_dataset(config.dataset).num_slots
    try:
        told = config.policy.units_told(units)
    except InvalidRequestError as e:  # which the site's own log has
        raise _refused(
            "the policy of this site does not fit its data: its operator finds what in the site's log"
        ) from e
    history = history_of(service, config.dataset)
    promised: list[Histogram] = []
    for other in state.unfinished():
        if other.digest != job.digest() and other.noise_multiplier is not None and now < other.job.expires:
            charged = len(charges_of(history, state.run_ids(other.digest)))
            promised.append(remaining(other.noise_multiplier, other.job, told, charged))
    return Holding(
        public_units=told,
        terms=history.in_force,
        spent=as_public(histogram(history.releases), units, told),
        promised=merged(promised),
    )


def _refused(message: str) -> FederationRefusedError:
    return FederationRefusedError(message, reason="policy")

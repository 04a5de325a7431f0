"""What a federated job came to: everything that a report needs, and nothing that a reader must not learn."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

import rfc8785
from pydantic import BaseModel, ConfigDict, Field

from tg_tinker.errors import TGTinkerError
from tg_tinker.federated.aggregation import poison_borne
from tg_tinker.federated.job import Job
from tg_tinker.federated.rounds import Answer, RoundRecord
from tg_tinker.federated.statement import SiteStatement, verify_statement
from tg_tinker.reports.statement import number, rounded_up

DIGITS = 2  # to which sites round up


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SiteLevel(_Part):
    """What was promised to whole sites.

    Attributes:
        dataset_id: name of the ledger at the coordinator's server that was charged; see ``ledger_of``.
        epsilon: spent there by all jobs over these sites, rounds whose result was lost included.
        bound: last clipping bound.
        numbers: behind the decision that the job may begin; see ``site_privacy.check_feasible``.
    """

    dataset_id: str
    epsilon: float
    delta: float
    bound: float
    numbers: dict[str, float]


class Promise(_Part):
    """The worst case over everybody in any site's records: the job's target, or more where a site states more.

    Attributes:
        epsilon: ``None`` where records are not protected, or a site states that its own are not.
        broken: what a site states beyond the job's terms, by site.
    """

    epsilon: float | None
    delta: float | None
    unit: str | None
    people: Literal["disjoint", "shared"] | None
    broken: dict[str, str] = Field(default_factory=dict)


class FederatedResult(_Part):
    """The end of a job, or of one attempt at it.

    Attributes:
        job: as the sites accepted it.
        job_digest: its name in every message and note.
        status: "failed" may be run again: it goes on from the last released round.
        why: it failed.
        members: sites that accepted and did not leave.
        left: sites that refused, with their reasons.
        unheard: sites that never said a word.
        rounds: that were released. Who took part is not told where that would tell who was drawn.
        first_metrics: of the evaluation before the first round.
        ignored: replies that were late, repeated or uncalled for.
        artifact_id: of the last released adapter, encrypted at the coordinator's server.
        weights_digest: of its weights.
        records: promise to the people in the records.
        sites: promise to the sites.
        statements: of sites on what they spent, each in a DSSE envelope that its key signed.
        unstated: why a site gave none.
        trust: who can see or do what, as codes; see docs.
        ended: when.
    """

    format: Literal["tg-tinker/federated-result/v1"] = "tg-tinker/federated-result/v1"
    job: Job
    job_digest: str
    status: Literal["finished", "failed"]
    why: str
    members: tuple[str, ...]
    left: dict[str, Answer]
    unheard: tuple[str, ...]
    rounds: tuple[RoundRecord, ...]
    first_metrics: dict[str, float]
    ignored: int
    artifact_id: str
    weights_digest: str
    records: Promise
    sites: SiteLevel | None
    statements: dict[str, dict[str, Any]] = Field(default_factory=dict)
    unstated: dict[str, str] = Field(default_factory=dict)
    trust: dict[str, Any]
    ended: datetime


def ledger_of(job: Job) -> str:
    """The dataset id under which the coordinator's server charges the privacy of a job's sites.

    It follows from the keys on the roster alone: jobs over the same sites share one budget. A roster with a site more
    or less has another ledger, so that what a site spent there is not counted here.
    """
    keys = hashlib.sha256(rfc8785.dumps(sorted(job.roster.values()))).hexdigest()
    return f"federation-sites:{keys}"


def promise_of(job: Job, statements: Mapping[str, Mapping[str, Any]] | None = None) -> Promise:
    """The largest promise over all sites: one site's for disjoint people, the sum where anybody may be everywhere.

    Args:
        statements: of sites, in their envelopes. Each that its site signed on this job counts, also one that
            contradicts itself or the job elsewhere: it can only make the promise weaker. Without one a site counts at
            the job's target.
    """
    records = job.records
    if records is None:
        return Promise(epsilon=None, delta=None, unit=None, people=None)
    epsilons = dict.fromkeys(job.roster, records.target_epsilon)
    deltas = dict.fromkeys(job.roster, records.target_delta)
    broken = {}
    for site, said in _signed(job, statements or {}).items():
        if over := excess(job, said):
            broken[site] = over
        if said.unit == records.unit:  # a figure for another unit says nothing of this one
            epsilons[site] = max(epsilons[site], said.epsilon_spent)
            deltas[site] = max(deltas[site], float(said.delta))
    total = max if records.people == "disjoint" else sum
    epsilon = total(epsilons.values())
    return Promise(
        epsilon=epsilon if math.isfinite(epsilon) else None,
        delta=min(total(deltas.values()), 1 - 2**-53),
        unit=records.unit,
        people=records.people,
        broken=broken,
    )


def excess(job: Job, said: SiteStatement) -> str:
    """What a site states beyond the terms of the job, for people; empty where it kept to them."""
    records = job.records
    if records is None:
        return ""
    over = []
    # Sites round epsilon up, and may so pass a target that they kept.
    if said.epsilon_spent > records.target_epsilon and said.epsilon != rounded_up(records.target_epsilon, DIGITS):
        over.append(f"epsilon {said.epsilon}, and the job's target is {number(records.target_epsilon)}")
    if float(said.delta) > records.target_delta:
        over.append(f"delta {said.delta}, and the job's is {number(records.target_delta)}")
    if said.unit != records.unit:
        over.append(f"unit {said.unit!r}, and the job's is {records.unit!r}")
    return "; ".join(over)


def _signed(job: Job, statements: Mapping[str, Mapping[str, Any]]) -> dict[str, SiteStatement]:
    found, digest = {}, job.digest()
    for site, envelope in sorted(statements.items()):
        try:
            said = verify_statement(envelope, job.roster[site])
        except (TGTinkerError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue
        if (said.site, said.job) == (site, digest):
            found[site] = said
    return found


def trust_of(job: Job) -> dict[str, Any]:
    """Who can see or do what in this job."""
    sampled = job.sites is not None and job.sites.sample_rate < 1
    return {
        "coordinator_sees_updates": job.masking is None,
        "coordinator_is_trusted_with_site_privacy": job.sites is not None,
        "site_sampling_attested_by": "coordinator" if sampled else None,
        "carrier_sees_who_takes_part": True,
        "carrier_sees_updates": job.masking is None,
        "carrier_can_alter_messages": False,
        "records_protected_at_sites": job.records is not None,
        "poisoned_updates_borne": poison_borne(job),
    }

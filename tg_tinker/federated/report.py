"""The federation report, format tg-tinker/federation-report/v1: what one federated job promised to whom.

The coordinator writes and signs it; sites' own signed statements are inside, and where whole sites are protected the
signed report on their ledger. Every figure and sentence follows from these, from the job and from what the
coordinator says happened: whoever verifies a report makes it again and compares. Real numbers are decimal strings;
epsilons are rounded up.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import ROUND_CEILING, Decimal, localcontext
from typing import Any, Final

import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tg_tinker.errors import InvalidRequestError
from tg_tinker.federated import report_words as words
from tg_tinker.federated.job import Job
from tg_tinker.federated.keys import public_text
from tg_tinker.federated.masking import MaskingSetting
from tg_tinker.federated.masking.ring import error_bound
from tg_tinker.federated.report_facts import Course, Facts
from tg_tinker.federated.report_sites import open_own_report, read_statement
from tg_tinker.federated.result import ledger_of
from tg_tinker.federated.statement import SiteStatement
from tg_tinker.ledger.history import NEIGHBOURS
from tg_tinker.reports.statement import number
from tg_tinker.transparency.dsse import sign_envelope
from tg_tinker.transparency.note import VerifierKey

FORMAT: Final = "tg-tinker/federation-report/v1"
PAYLOAD_TYPE: Final = "application/vnd.tg-tinker.federation-report.v1+json"
KEY_NAME: Final = "tg-tinker-coordinator"
"""The name of every coordinator's verifier key: all else in its text follows from the public key."""
SECTIONS: Final = (
    "format",
    "time",
    "writer",
    "job",
    "job_digest",
    "guarantee",
    "sites",
    "course",
    "method",
    "masking",
    "model",
    "trust_model",
    "coverage",
    "statements",
    "unstated",
    "site_level_report",
    "integrity",
)

Statements = Mapping[str, SiteStatement]


def coordinator_key(public_key: Ed25519PublicKey) -> VerifierKey:
    """A coordinator's key, as ``audit verify --key`` takes it."""
    return VerifierKey(KEY_NAME, public_key.public_bytes_raw())


def read_statements(facts: Facts) -> dict[str, SiteStatement]:
    """Every statement in a report.

    Raises:
        InvalidRequestError: one is not its site's, or contradicts the job or the course.
    """
    return {
        site: read_statement(facts.job, site, envelope, digest=facts.job_digest, course=facts.course)
        for site, envelope in sorted(facts.statements.items())
    }


def site_level_epsilon(facts: Facts) -> Decimal | None:
    """What the report on the sites' ledger states; it is verified by itself. ``None`` where there is none.

    Raises:
        InvalidRequestError: it is no privacy report.
    """
    if facts.site_level_report is None:
        return None
    _, report = open_own_report(rfc8785.dumps(facts.site_level_report), "the report on the sites' ledger", "sites")
    try:
        return Decimal(str(report["guarantee"]["epsilon"]))
    except (KeyError, TypeError, ArithmeticError) as e:
        raise InvalidRequestError(
            "the report on the sites' ledger states no epsilon", field="site_level_report", constraint="a report"
        ) from e


def document(facts: Facts, statements: Statements, site_epsilon: Decimal | None, key: VerifierKey) -> dict[str, Any]:
    """The report: JSON values, in the sections of ``SECTIONS``.

    Args:
        statements: those of the facts, read.
        site_epsilon: by the report on the sites' ledger.
        key: who signs.
    """
    job, course = facts.job, facts.course
    missing = len(job.roster) - len(statements)
    return {
        "format": FORMAT,
        "time": facts.time,
        "writer": facts.writer,
        "job": facts.job_json,
        "job_digest": facts.job_digest,
        "guarantee": _guarantee(facts, statements, site_epsilon),
        "sites": [_site(facts, site, statements.get(site)) for site in sorted(job.roster)],
        "course": course.model_dump(mode="json"),
        "method": {
            "strategy": words.STRATEGIES[job.strategy.name],
            "federated_lora": words.FACTORS[job.federated_lora],
        },
        "masking": _masking(job),
        "model": {
            "artifact_id": facts.artifact_id,
            "weights_digest": course.rounds[-1].weights_digest if course.rounds else job.adapter_digest,
        },
        "trust_model": words.trust_model(job),
        "coverage": {"covered": words.covered(job), "not_covered": words.not_covered(job, missing=missing)},
        "statements": facts.statements,
        "unstated": facts.unstated,
        "site_level_report": facts.site_level_report,
        "integrity": {"verifier_key": key.text},
    }


def sign_report(report: Mapping[str, Any], key: Ed25519PrivateKey) -> bytes:
    """The file: a DSSE envelope in canonical JSON."""
    envelope = sign_envelope(PAYLOAD_TYPE, rfc8785.dumps(dict(report)), coordinator_key(key.public_key()), key.sign)
    return rfc8785.dumps(envelope)


def signed_by_coordinator(job: Job, key: Ed25519PublicKey) -> None:
    """Require the key to be the one that the job names as its coordinator's.

    Raises:
        InvalidRequestError: it is another.
    """
    if public_text(key) != job.coordinator:
        raise InvalidRequestError(
            "this is not the key of the job's coordinator, which alone may sign the report",
            field="key",
            constraint="the coordinator's key",
        )


def _guarantee(facts: Facts, statements: Statements, site_epsilon: Decimal | None) -> dict[str, Any]:
    job = facts.job
    records = _records(job, statements)
    said = [words.records_sentence(job, *(("", "") if records is None else (records["epsilon"], records["delta"])))]
    sites = None
    if job.sites is not None and site_epsilon is not None:
        epsilon = words.epsilon_text(site_epsilon)
        delta = words.delta_text(Decimal(number(job.sites.target_delta)))
        sites = {
            "neighbours": NEIGHBOURS,
            "population": job.sites.population,
            "epsilon": epsilon,
            "delta": delta,
            "target_epsilon": number(job.sites.target_epsilon),
            "ledger": ledger_of(facts.job),
        }
        said.append(words.sites_sentence(epsilon, delta))
    return {"sentence": " ".join(said), "records": records, "sites": sites}


def _records(job: Job, statements: Statements) -> dict[str, Any] | None:
    """Over all sites: the largest epsilon or the sum. Who gave no statement counts with the job's target."""
    records = job.records
    if records is None:
        return None
    each = [_counted(job, statements.get(site)) for site in sorted(job.roster)]
    target = Decimal(number(records.target_delta))
    deltas = [max(target, Decimal(statements[s].delta)) if s in statements else target for s in job.roster]
    with localcontext(prec=1000, rounding=ROUND_CEILING):
        summed = records.people == "shared"
        epsilon, delta = (sum(each, Decimal(0)), sum(deltas, Decimal(0))) if summed else (max(each), max(deltas))
    return {
        "unit": records.unit,
        "neighbours": NEIGHBOURS,
        "people": records.people,
        "over_sites": "sum" if summed else "max",
        "epsilon": words.epsilon_text(epsilon if delta < 1 else words.INFINITE),
        "delta": words.delta_text(min(delta, Decimal(1))),
        "target_epsilon": number(records.target_epsilon),
        "target_delta": number(records.target_delta),
        "stated": len(statements),
        "assumed": len(each) - len(statements),
    }


def _counted(job: Job, statement: SiteStatement | None) -> Decimal:
    """A site's epsilon for this job, as it enters the promise over all sites."""
    if job.records is None:
        return words.INFINITE
    return Decimal(number(job.records.target_epsilon) if statement is None else statement.epsilon)


def _site(facts: Facts, site: str, statement: SiteStatement | None) -> dict[str, Any]:
    """A row of the table of sites."""
    job, course = facts.job, facts.course
    told = job.sites is None
    return {
        "site": site,
        "public_key": job.roster[site],
        "membership": _membership(course, site),
        "statement": "signed" if statement is not None else "missing" if told else "withheld",
        "epsilon": words.epsilon_text(_counted(job, statement)),
        "delta": statement.delta
        if statement is not None
        else number(job.records.target_delta)
        if job.records
        else None,
        "basis": "statement" if statement is not None else "target" if job.records else "nothing",
        "rounds_trained": None if statement is None else len(statement.rounds),
        "rounds_used": len(course.used_rounds(site)) if told else None,
        "all_of_its_data": None
        if statement is None
        else {
            "epsilon": statement.dataset_epsilon,
            "delta": statement.dataset_delta,
            "target_epsilon": statement.dataset_target_epsilon,
        },
    }


def _membership(course: Course, site: str) -> str:
    if course.members is None:
        return "not told"
    if site in course.members:
        return "member"
    return "left" if site in (course.left or {}) else "silent"


def _masking(job: Job) -> dict[str, Any] | None:
    if job.masking is None:
        return None
    setting = MaskingSetting.of(job)
    return {
        "threshold": setting.threshold,
        "sites_in_league": setting.sites_in_league,
        "clip": number(setting.clip),
        "bits": setting.bits,
        "quantisation_error": number(error_bound(setting.clip, setting.bits)),
    }

"""Checks a federation report with nothing but itself and the coordinator's public key: no network, no server.

What is believed, and why: a site's epsilon because the site signed it; the epsilon of whole sites because it follows
from the entries of their ledger; the figures over all sites because they are computed here again. What happened in a
round is the coordinator's word, as far as no site's signed statement contradicts it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from tg_tinker.errors import FederationRefusedError, InvalidRequestError
from tg_tinker.federated.job import Job
from tg_tinker.federated.masking import MaskingSetting
from tg_tinker.federated.report import (
    FORMAT,
    PAYLOAD_TYPE,
    SECTIONS,
    Statements,
    document,
    read_statements,
    signed_by_coordinator,
    site_level_epsilon,
)
from tg_tinker.federated.report_facts import UNTOLD, Course, Facts
from tg_tinker.federated.report_sites import check_site_report, open_own_report, second_opinion
from tg_tinker.federated.result import ledger_of
from tg_tinker.reports.statement import number
from tg_tinker.reports.verdicts import REGISTRY, Document, Trust, Verdict, refused, same
from tg_tinker.transparency.note import VerifierKey

# Sections in the order in which they are made again and compared, and the check that a difference fails.
FOLLOWS: Final = (
    ("time", "format"),
    ("writer", "format"),
    ("course", "course"),
    ("statements", "statement"),
    ("unstated", "statement"),
    ("sites", "site epsilon"),
    ("guarantee", "guarantee"),
    ("masking", "masking"),
    ("method", "method"),
    ("model", "model"),
    ("trust_model", "trust model"),
    ("coverage", "coverage"),
    ("site_level_report", "sites"),
    ("integrity", "signer"),
)


@REGISTRY.register(PAYLOAD_TYPE)
def verify_federation_report(found: Document) -> Iterator[Verdict]:
    """Check a report to the end; see :meth:`Registry.verify`."""
    report = found.value
    facts = _facts(report)
    yield Verdict("format", f"{FORMAT}, every field known")
    job, course = facts.job, facts.course
    _check_job(report, facts, found.key)
    yield Verdict("job", f"{job.job_id!r}, digest {facts.job_digest}; signed by the coordinator that it names")
    _check_course(job, course)
    yield Verdict("course", _happened(job, course))
    statements = read_statements(facts)
    _check_missing(facts)
    yield from _said(job, facts, statements)
    if job.records is not None and statements:
        yield Verdict("second accountant", second_opinion(statements))
    if job.sites is not None:
        yield from _site_level(job, facts, found.trust)
    _check_the_rest(report, facts, statements, found.key)
    yield Verdict("guarantee", str(report["guarantee"]["sentence"]))
    if job.masking is not None:
        masking = report["masking"]
        yield Verdict(
            "masking",
            f"sums over {masking['threshold']} sites or more; rounding moves a coordinate of a mean by "
            f"{masking['quantisation_error']} at most",
        )
    yield Verdict("coverage", "tables, trust model and coverage follow from the job and the statements")
    for data in found.trust.beside:
        yield from check_site_report(data, job, statements, found.trust)


def _facts(report: Mapping[str, Any]) -> Facts:
    if report.get("format") != FORMAT:
        raise refused("format", f"it says it is {str(report.get('format'))[:100]!r}, not {FORMAT!r}")
    odd = sorted(set(SECTIONS) ^ set(report))
    if odd:
        raise refused("format", f"it has too many or too few fields: {', '.join(odd)[:200]}")
    try:
        return Facts.read(report)
    except (ValueError, KeyError, TypeError, OverflowError) as e:
        raise refused("format", f"a field is missing, unknown or impossible: {str(e)[:300]}") from e


def _check_job(report: Mapping[str, Any], facts: Facts, key: VerifierKey) -> None:
    """The digest is of the job as it stands here; fields that later versions added may be missing from it."""
    job = facts.job
    same("job_digest", "job", report["job_digest"], facts.job_digest)
    if not _within(facts.job_json, json.loads(rfc8785.dumps(job.model_dump(mode="json")))):
        raise refused("job", "it is not spelt as sites agree to a job")
    try:
        signed_by_coordinator(job, Ed25519PublicKey.from_public_bytes(key.public_key))
    except InvalidRequestError as e:
        raise refused("signer", e.message) from e
    if job.masking is not None:
        try:
            MaskingSetting.of(job)
        except FederationRefusedError as e:
            raise refused("masking", e.message) from e


def _within(said: object, whole: object) -> bool:
    """Whether a JSON value is the other one, or lacks some of its fields."""
    if isinstance(said, dict) and isinstance(whole, dict):
        return all(name in whole and _within(value, whole[name]) for name, value in said.items())
    return type(said) is type(whole) and said == whole


def _check_course(job: Job, course: Course) -> None:
    numbers = [r.round for r in course.rounds]
    if numbers != list(range(1, len(numbers) + 1)) or len(numbers) > job.rounds:
        raise _odd(f"its rounds are not 1 to {job.rounds}, or 1 to an earlier one")
    if (course.status == "finished") != (len(numbers) == job.rounds) or (course.status == "failed") != bool(
        course.why
    ):
        raise _odd(f"{len(numbers)} of {job.rounds} rounds were released, and it says that the job {course.status}")
    if any(r.skipped for r in course.rounds) and job.masking is None:
        raise _odd("it says that a round's updates were lost, which happens under masks only")
    told = [course.members, course.left, course.silent]
    told += [part for r in course.rounds for part in (r.updates, r.others)]
    if job.sites is not None:
        if any(part is not None for part in told) or course.why not in ("", UNTOLD):
            raise _odd("it tells who took part, which the privacy of sites rests on nobody knowing")
        return
    if any(part is None for part in told):
        raise _odd("it does not tell who took part, and nothing in the job hides it")
    _check_sites(job, course)


def _check_sites(job: Job, course: Course) -> None:
    named = [*(course.members or ()), *(course.left or {}), *(course.silent or ())]
    if sorted(named) != sorted(job.roster):
        raise _odd("its members, those who left and those who were silent are not the roster, each once")
    least = job.min_sites if job.masking is None else max(job.min_sites, MaskingSetting.of(job).threshold)
    joined = {*(course.members or ()), *(course.left or {})}
    for r in course.rounds:
        asked = [*(r.updates or ()), *(r.others or {})]
        if len(set(asked)) != len(asked) or not set(asked) <= joined:
            raise _odd(f"round {r.round} has a site twice, or one that never joined")
        if not r.skipped and len(r.updates or ()) < least:
            raise _odd(f"round {r.round} was released with {len(r.updates or ())} updates, and the job needs {least}")


def _happened(job: Job, course: Course) -> str:
    released = f"{len(course.rounds)} of {job.rounds} rounds released, as the coordinator says"
    if job.sites is not None:
        return f"{released}; who took part is not told, since whole sites are protected"
    lost = [str(r.round) for r in course.rounds if r.skipped]
    gone = [*(course.left or {}), *(course.silent or ())]
    return (
        f"{released}, by {len(course.members or ())} of {len(job.roster)} sites"
        + (f"; not: {', '.join(sorted(gone))}" if gone else "")
        + (f"; the updates of rounds {', '.join(lost)} were lost" if lost else "")
    )


def _check_missing(facts: Facts) -> None:
    """Each site of the roster gave a statement or is said to have given none."""
    stated, unstated = set(facts.statements), set(facts.unstated)
    if facts.job.sites is not None:
        if stated or unstated:
            raise refused("statement", "it has statements of sites, which tell when each of them was drawn")
    elif stated & unstated or stated | unstated != set(facts.job.roster):
        raise refused("statement", "a site of the roster is left out, or named twice, among statements and gaps")


def _said(job: Job, facts: Facts, statements: Statements) -> Iterator[Verdict]:
    for site, s in statements.items():
        trained = f"trained in {len(s.rounds)} of {job.rounds} rounds"
        if job.records is None:
            yield Verdict("statement", f"{site} (key {job.roster[site]}) {trained}, without privacy of records")
            continue
        yield Verdict(
            "statement",
            f"{site} (key {job.roster[site]}) {trained}, spent epsilon {s.epsilon} of {s.target_epsilon} at delta "
            f"{s.delta} by this job, and {s.dataset_epsilon} at {s.dataset_delta} of its data in all",
        )
    if facts.unstated:
        counted = (
            "" if job.records is None else f": counted at the job's target, {number(job.records.target_epsilon)}"
        )
        yield Verdict("statement", f"MISSING from {', '.join(sorted(facts.unstated))}{counted}")


def _site_level(job: Job, facts: Facts, trust: Trust) -> Iterator[Verdict]:
    """The report on the sites' ledger, checked as any report, and that it is on this job's."""
    assert job.sites is not None
    if facts.site_level_report is None:
        raise refused("sites", "the job protects whole sites, and the signed report on their ledger is missing")
    data = rfc8785.dumps(facts.site_level_report)
    key, report = open_own_report(data, "the report on the sites' ledger", "sites")
    for verdict in REGISTRY.verify(data, Trust(keys=[key], pins=trust.pins, receipts=trust.receipts)):
        yield Verdict(f"sites {verdict.check}", verdict.shows)
    # That no charge is over the target in force was checked with the entries; here, that this is the job's target.
    guarantee, releases = report["guarantee"], report["mechanism"]["releases"]
    pairs = [
        ("dataset", report["dataset_id"], ledger_of(job)),
        ("unit", guarantee["privacy_unit"], "site"),
        ("delta", guarantee["delta"], number(job.sites.target_delta)),
        ("target", guarantee["target_epsilon"], number(job.sites.target_epsilon)),
    ]
    for name, said, right in pairs:
        if said != right:
            raise refused("sites", f"the {name} of the report on their ledger is {said[:100]!r}, not {right!r}")
    rate = round(job.sites.population * job.sites.sample_rate) / job.sites.population
    charged, others = 0, 0
    for release in releases:
        event = release["event"]
        said = float(event.get("noise_multiplier", 0)), float(event.get("sample_rate", 1))
        if all(
            math.isclose(a, b, rel_tol=1e-9) for a, b in zip(said, (job.sites.noise_multiplier, rate), strict=True)
        ):
            charged += release["times"]
        else:  # of another job over the same sites, whose cost is in the total
            others += release["times"]
    if charged < len(facts.course.rounds):
        raise refused(
            "sites",
            f"{len(facts.course.rounds)} rounds were released, and {charged} were charged with the noise and rate of "
            "the job",
        )
    yield Verdict(
        "sites",
        f"{charged} charges for {len(facts.course.rounds)} released rounds, on the terms of the job"
        + (f"; {others} on other terms, by other jobs over these sites" if others else ""),
    )


def _check_the_rest(report: Mapping[str, Any], facts: Facts, statements: Statements, key: VerifierKey) -> None:
    """All that follows, made again."""
    if facts.job.sites is None and facts.site_level_report is not None:
        raise refused("sites", "it holds a report on a ledger of sites, and the job does not protect whole sites")
    last = facts.course.rounds[-1] if facts.course.rounds else None
    if last is not None and last.artifact_id != facts.artifact_id:
        raise refused("model", "its artifact is not that of the last round")
    expected = document(facts, statements, site_level_epsilon(facts), key)
    for name, check in FOLLOWS:
        same(name, check, report[name], expected[name])


def _odd(why: str) -> InvalidRequestError:
    return refused("course", why)

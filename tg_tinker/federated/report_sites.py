"""A site's closing statement in a federation report: whether it is the site's own, and fits the job and the rounds.

A site's full privacy report, where somebody has it, is held against its statement as well.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from tg_tinker.errors import InvalidRequestError, LogVerificationError
from tg_tinker.federated.job import Job
from tg_tinker.federated.result import DIGITS, excess
from tg_tinker.federated.statement import SiteStatement, verify_statement
from tg_tinker.ledger.history import History, read_history
from tg_tinker.ledger.releases import Release
from tg_tinker.privacy import gate_epsilon, renyi
from tg_tinker.reports import recompute
from tg_tinker.reports import verify as _report  # noqa: F401 - registers the type of the reports inside
from tg_tinker.reports.statement import PAYLOAD_TYPE, number, rounded_up
from tg_tinker.reports.verdicts import REGISTRY, Trust, Verdict, refused
from tg_tinker.transparency._encoding import from_base64
from tg_tinker.transparency.note import Checkpoint, VerifierKey, read_note

if TYPE_CHECKING:
    from tg_tinker.federated.report_facts import Course

MOST_BY_LOSS: Final = 64  # different accountings of one report whose loss distributions are computed
_NOTE_SIGNATURE = 64


def read_statement(job: Job, site: str, envelope: Mapping[str, Any], *, digest: str, course: Course) -> SiteStatement:
    """A site's statement, signed by its key of the roster and in line with the job and the course.

    Args:
        digest: of the job.

    Raises:
        InvalidRequestError, LogVerificationError: it is not; the message says where.
    """
    if site not in job.roster:
        raise _contradicts(f"{site} is not on the job's roster")
    try:
        statement = verify_statement(envelope, job.roster[site])
    except (InvalidRequestError, LogVerificationError) as e:
        raise _contradicts(f"{site}: {e.message}") from e
    if statement.site != site:
        raise _contradicts(f"that of {site} is by {statement.site}")
    if statement.job != digest:
        raise _contradicts(f"that of {site} is on another job, {statement.job}")
    _check_terms(job, statement)
    _check_rounds(job, statement, course)
    _check_accounting(job, statement)
    _check_note(statement)
    return statement


def _check_terms(job: Job, statement: SiteStatement) -> None:
    site, records = statement.site, job.records
    if records is None:
        if statement.target_epsilon != "inf":
            raise _contradicts(f"{site} states a target, and the job has none")
    else:
        terms = (number(records.target_epsilon), number(records.target_delta), records.unit)
        same = terms == (statement.target_epsilon, statement.delta, statement.unit)
        # More than the job allowed is no contradiction: it counts, and the promise is the weaker for it.
        if not same and (statement.unit != records.unit or not excess(job, statement)):
            raise _contradicts(
                f"{site} states target, delta and unit {statement.target_epsilon}, {statement.delta} and "
                f"{statement.unit[:40]!r}; the job has {terms[0]}, {terms[1]} and {terms[2]!r}"
            )
    spent, limit = _real(statement.dataset_epsilon), _real(statement.dataset_target_epsilon)
    if spent > _ceiling(limit):
        raise _over(
            f"{site} spent epsilon {statement.dataset_epsilon} of its data in all, over its budget "
            f"{statement.dataset_target_epsilon}"
        )
    if float(statement.dataset_delta) <= float(statement.delta) and spent < statement.epsilon_spent:
        raise _over(f"{site} spent more by the job than by everything together")


def _check_rounds(job: Job, statement: SiteStatement, course: Course) -> None:
    """A site may have trained for nothing, when its reply was late; it cannot have sent what it did not train."""
    site, last = statement.site, min(len(course.rounds) + 1, job.rounds)
    if statement.rounds and statement.rounds[-1] > last:
        raise _contradicts(f"{site} trained in round {statement.rounds[-1]}, and {last} is the last that was begun")
    missing = sorted(set(course.sent_rounds(site)) - set(statement.rounds))
    if missing:
        raise _contradicts(f"the report has an update of {site} in round {missing[0]}, and {site} says it sent none")
    if statement.rounds and site in (course.silent or ()):
        raise _contradicts(f"{site} trained in round {statement.rounds[0]}, and the report says it never said a word")


def _check_accounting(job: Job, statement: SiteStatement) -> None:
    """Epsilon by the gate, from what the site discloses; more than it states is refused."""
    disclosed = statement.accounting
    if disclosed is None:
        if job.records is not None and statement.rounds and not statement.epsilon_spent:
            raise _over(f"{statement.site} trained, and states that it spent nothing")
        return
    least = len(statement.rounds) * job.local_steps
    if disclosed.steps < least:
        raise _over(f"{statement.site} discloses {disclosed.steps} steps, and its rounds took {least}")
    try:
        cost = _gate(*_spent(statement), float(statement.delta))
    except InvalidRequestError as e:
        raise _over(f"what {statement.site} discloses is no training: {e.message}") from e
    if cost > statement.epsilon_spent * (1 + recompute.TOLERANCE):
        raise _over(
            f"{statement.site} states epsilon {statement.epsilon}, and the steps that it discloses cost "
            f"{rounded_up(cost)}"
        )


def _check_note(statement: SiteStatement) -> None:
    """The log's checkpoint is in its form. Its key is not here; a site's full report has it."""
    try:
        body, signatures = read_note(statement.log_checkpoint)
        origin = Checkpoint.parse(body).origin
    except LogVerificationError as e:
        raise _contradicts(f"{statement.site}: {e.message}") from e
    signed = [s for name, _, s in signatures if name == origin and len(s) == _NOTE_SIGNATURE]
    if origin != statement.log_origin or not signed:
        raise _contradicts(f"{statement.site} names another log than its checkpoint is of, or it is not signed")


def second_opinion(statements: Mapping[str, SiteStatement]) -> str:
    """What privacy loss distributions say of the disclosed accountings, in words.

    Raises:
        InvalidRequestError: a site states less than its steps cost at least.
    """
    disclosed = {name: s for name, s in sorted(statements.items()) if s.accounting is not None}
    if not disclosed:
        return "no site discloses what its epsilon was computed from: each rests on the site's signature"
    done: set[tuple[float, float, int, float]] = set()
    left_out = 0
    for name, statement in disclosed.items():
        case = (*_spent(statement), float(statement.delta))
        if case not in done and len(done) >= MOST_BY_LOSS:
            left_out += 1
            continue
        done.add(case)
        below = _below_loss(statement.epsilon_spent, *case)
        if below is not None:
            raise _over(
                f"{name} states epsilon {statement.epsilon}, and its steps have at least {below} by privacy loss "
                "distributions"
            )
    silent = len(statements) - len(disclosed)
    return (
        f"{len(disclosed)} sites disclose noise, rate and steps: by the gate and by privacy loss distributions "
        "(dp-accounting) these cost no more than stated"
        + (f"; {left_out} of them by the gate alone" if left_out else "")
        + (f"; {silent} disclose nothing, and their epsilon rests on their signature" if silent else "")
    )


def _below_loss(said: float, sigma: float, rate: float, steps: int, delta: float) -> float | None:
    """Epsilon of these steps where it is more than was said: by the upper bound, and where that is more, a lower."""
    for pessimistic in (True, False):
        bound = _by_loss(sigma, rate, steps, delta, pessimistic)
        if said >= bound or math.isinf(bound):
            return None
    return bound


@lru_cache(maxsize=2 * MOST_BY_LOSS)
def _by_loss(sigma: float, rate: float, steps: int, delta: float, pessimistic: bool) -> float:
    """Epsilon by privacy loss distributions; inf where they have none."""
    found = recompute.loss_distribution({(sigma, rate): steps}, pessimistic=pessimistic)
    return math.inf if found is None else float(found.get_epsilon(delta))


def check_site_report(
    data: bytes, job: Job, statements: Mapping[str, SiteStatement], trust: Trust
) -> Iterator[Verdict]:
    """Check a site's full report, and that the site's statement says what it says.

    Raises:
        InvalidRequestError: check "site report": no statement vouches for it, it is wrong, or it says otherwise.
    """
    digest = hashlib.sha256(data).hexdigest()
    found = next((s for _, s in sorted(statements.items()) if s.report_sha256 == digest), None)
    if found is None:
        raise refused("site report", f"no site's statement is about the report with SHA-256 {digest}")
    key, report = open_own_report(data, f"the report of {found.site}", "site report")
    if (key.name, report["integrity"]["checkpoint"]) != (found.log_origin, found.log_checkpoint):
        raise refused("site report", f"it is of another log, or of another moment, than {found.site} states")
    for verdict in REGISTRY.verify(data, Trust(keys=[key], pins=trust.pins, receipts=trust.receipts)):
        yield Verdict(f"{found.site} {verdict.check}", verdict.shows)
    history = read_history(report["dataset_id"], [e["body"] for e in report["integrity"]["entries"]])
    _compare(job, found, history)
    yield Verdict(
        "site report",
        f"what {found.site} states of its data follows from it, and the epsilon {found.epsilon} that it states for "
        f"this job is no less than the cheapest {len(found.rounds) * job.local_steps} steps in it cost",
    )


def open_own_report(data: bytes, what: str, check: str) -> tuple[VerifierKey, dict[str, Any]]:
    """A privacy report and the key that it names for itself. Whoever vouches for the report vouches for the key.

    Raises:
        InvalidRequestError: it is no report that could be verified.
    """
    try:
        envelope = json.loads(data)
        if envelope["payloadType"] != PAYLOAD_TYPE:
            raise ValueError
        report: dict[str, Any] = json.loads(from_base64(envelope["payload"]))
        key = VerifierKey.parse(report["integrity"]["verifier_key"])
        if key != VerifierKey.of(key.public_key) or not isinstance(report["dataset_id"], str):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, LogVerificationError) as e:
        raise refused(check, f"{what} is no privacy report of this version") from e
    return key, report


def _compare(job: Job, statement: SiteStatement, history: History) -> None:
    """The statement against the entries of the site's ledger. They do not say which runs were of the job."""
    terms, site = history.in_force, statement.site
    pairs = [
        ("unit", statement.unit, terms.unit),
        ("dataset_delta", statement.dataset_delta, number(terms.target_delta)),
        ("dataset_target_epsilon", statement.dataset_target_epsilon, number(terms.target_epsilon)),
    ]
    for name, said, right in pairs:
        if said != right:
            raise refused("site report", f"{site} states {name} {said[:40]!r}, and its report has {right!r}")
    spent = rounded_up(history.epsilon_spent, DIGITS)
    if _real(statement.dataset_epsilon) < _real(spent):  # stated for the public number of units, it may be more
        raise refused(
            "site report",
            f"{site} states dataset_epsilon {statement.dataset_epsilon!r}, and its report has {spent!r}",
        )
    if history.slots is not None and statement.public_units > history.slots:
        raise refused(
            "site report", f"{site} states more units than its report has, and with them too little epsilon"
        )
    steps = len(statement.rounds) * job.local_steps
    releases = list(history.releases)
    if statement.accounting is not None:
        sigma, rate, steps = _spent(statement)
        releases = [r for r in releases if r.noise_multiplier == sigma and r.sample_rate <= rate]
    if len(releases) < steps:
        raise refused("site report", f"{site} took {steps} steps, and its report has {len(releases)} that fit")
    least = _least(releases, steps, float(statement.delta))
    if least > statement.epsilon_spent * (1 + recompute.TOLERANCE):
        raise refused(
            "site report",
            f"{site} states epsilon {statement.epsilon}, and any {steps} steps in its report cost at least "
            f"{rounded_up(least)}",
        )


def _least(releases: list[Release], steps: int, delta: float) -> float:
    """No ``steps`` of these releases cost less: the cheapest of them at each Renyi order, so often."""
    if not steps:
        return 0.0
    if any(r.noise_multiplier == 0 for r in releases):
        return 0.0 if any(r.noise_multiplier for r in releases) else math.inf
    kinds = {(r.noise_multiplier, r.sample_rate) for r in releases}
    cheapest = np.minimum.reduce([renyi.step_costs(*kind) for kind in sorted(kinds)])
    return renyi.epsilon(renyi.repeated(cheapest, steps), delta)


def _spent(statement: SiteStatement) -> tuple[float, float, int]:
    assert statement.accounting is not None
    a = statement.accounting
    return float(a.noise_multiplier), float(a.sample_rate), a.steps


@lru_cache(maxsize=1024)
def _gate(sigma: float, rate: float, steps: int, delta: float) -> float:
    return gate_epsilon({(sigma, rate): steps} if steps else {}, delta)


def _real(text: str) -> float:
    return math.inf if text == "inf" else float(text)


def _ceiling(target: float) -> float:
    """The largest figure that a rounded epsilon within the target can have."""
    return _real(rounded_up(target, DIGITS))


def _contradicts(why: str) -> InvalidRequestError:
    return refused("statement", why)


def _over(why: str) -> InvalidRequestError:
    return refused("site epsilon", why)

"""What a federation report rests on: the job, what the coordinator says happened, and what others signed.

Everything else in a report follows from this. Where whole sites are protected, nothing in here tells who took part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime
from functools import cached_property
from typing import Annotated, Any, Final, Literal, Self

import rfc8785
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from tg_tinker.errors import InvalidRequestError, TGTinkerError
from tg_tinker.federated.job import Job, SiteName
from tg_tinker.federated.report_sites import read_statement
from tg_tinker.federated.result import FederatedResult, ledger_of
from tg_tinker.federated.rounds import Answer, RoundRecord
from tg_tinker.federated.statement import Digest

UNTOLD: Final = "not told here, since it may name sites"
_SHOWN = 300  # characters of what somebody said
_LONGEST = 20_000

Text = Annotated[str, StringConstraints(max_length=_SHOWN)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Reply(_Part):
    """Why a site's update of a round was not used, or why it left; ``reason`` is a code, ``message`` for people."""

    kind: Literal["refused", "bad_update", "no_answer"]
    reason: str = Field(max_length=40)
    message: Text

    @classmethod
    def of(cls, answer: Answer) -> Self:
        """The last word of a site that is no update."""
        return cls.model_validate(
            {"kind": answer.kind, "reason": answer.reason[:40], "message": answer.message[:_SHOWN]}
        )


class Round(_Part):
    """A released round.

    Attributes:
        attempts: how often sites were asked.
        updates: sites that sent a good update, sorted; ``None`` where it is not told.
        others: what became of every other site that was asked; ``None`` likewise.
        skipped: why the model stayed as it was, and the updates were lost; empty for a round that was not.
    """

    round: int = Field(ge=1)
    attempts: int = Field(ge=1)
    updates: tuple[SiteName, ...] | None
    others: dict[SiteName, Reply] | None
    skipped: Text
    artifact_id: str = Field(max_length=200)
    weights_digest: Digest

    @classmethod
    def of(cls, record: RoundRecord, *, told: bool) -> Self:
        """A round as the coordinator recorded it; without its sites unless that may be ``told``."""
        answers = record.answers if told else None
        return cls(
            round=record.round,
            attempts=record.attempts,
            updates=None if answers is None else tuple(sorted(s for s, a in answers.items() if a.kind == "update")),
            others=None
            if answers is None
            else {s: Reply.of(a) for s, a in sorted(answers.items()) if a.kind != "update"},
            skipped=record.skipped[:_SHOWN],
            artifact_id=record.artifact_id,
            weights_digest=record.weights_digest,
        )


class Course(_Part):
    """What the coordinator says happened.

    Attributes:
        members: sites that accepted the job and did not leave; ``None``, as below, where it is not told.
        left: sites that refused the job, at its beginning or later.
        silent: sites that never said a word.
    """

    status: Literal["finished", "failed"]
    why: str = Field(max_length=_LONGEST)
    members: tuple[SiteName, ...] | None
    left: dict[SiteName, Reply] | None
    silent: tuple[SiteName, ...] | None
    rounds: tuple[Round, ...]

    def used_rounds(self, site: str) -> tuple[int, ...]:
        """Rounds in which a site's update went into the model."""
        return tuple(r.round for r in self._sent.get(site, ()) if not r.skipped)

    def sent_rounds(self, site: str) -> tuple[int, ...]:
        """Rounds in which a site sent a good update, used or lost."""
        return tuple(r.round for r in self._sent.get(site, ()))

    @cached_property
    def _sent(self) -> dict[str, list[Round]]:
        found: dict[str, list[Round]] = {}
        for r in self.rounds:
            for site in r.updates or ():
                found.setdefault(site, []).append(r)
        return found


class Facts(_Part):
    """All that a report is made from.

    Attributes:
        job: as the sites accepted it; ``job_json`` is what its digest is of.
        writer: version of tg-tinker that wrote the report.
        artifact_id: of the last adapter, encrypted at the coordinator's server.
        statements: of sites, each in its DSSE envelope.
        unstated: what the coordinator says of sites without one.
        site_level_report: on the ledger of the sites, in its DSSE envelope.
    """

    time: Annotated[str, StringConstraints(max_length=64)]
    writer: Annotated[str, StringConstraints(max_length=64)]
    job_json: dict[str, Any]
    job: Job
    course: Course
    artifact_id: Annotated[str, StringConstraints(max_length=200)]
    statements: dict[SiteName, dict[str, Any]]
    unstated: dict[SiteName, Text]
    site_level_report: dict[str, Any] | None

    @property
    def job_digest(self) -> str:
        """The job's name: SHA-256 of it in JCS, hex."""
        return hashlib.sha256(rfc8785.dumps(self.job_json)).hexdigest()

    @model_validator(mode="after")
    def _dated(self) -> Self:
        if datetime.fromisoformat(self.time).tzinfo is None:
            raise ValueError("the time has no zone")
        return self

    @classmethod
    def of(cls, result: FederatedResult, *, writer: str, site_level_report: bytes | None) -> Self:
        """What a job came to.

        A statement that is not the site's own, or contradicts the job or the course, counts as missing, with the
        reason: one site cannot keep all others from being reported on.

        Raises:
            InvalidRequestError: the job protects whole sites, and the report on their ledger is missing or no report;
                or it does not, and there is one.
        """
        job, told = result.job, result.job.sites is None
        rounds = tuple(Round.of(r, told=told) for r in result.rounds)
        course = Course(
            status=result.status,
            why=result.why[:_LONGEST] if told or not result.why else UNTOLD,
            members=tuple(sorted(result.members)) if told else None,
            left={s: Reply.of(a) for s, a in sorted(result.left.items())} if told else None,
            silent=tuple(sorted(result.unheard)) if told else None,
            rounds=rounds,
        )
        statements, unstated = _usable(result, course) if told else ({}, {})
        return cls(
            time=result.ended.isoformat(timespec="seconds"),
            writer=writer,
            job_json=json.loads(rfc8785.dumps(job.model_dump(mode="json"))),
            job=job,
            course=course,
            artifact_id=result.artifact_id,
            statements=statements,
            unstated=unstated,
            site_level_report=_envelope(job, site_level_report),
        )

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Self:
        """The facts in a report. They are compared with the document again when it is made anew from them.

        Raises:
            ValueError, KeyError, TypeError: they are not in their form.
        """
        try:
            return cls.model_validate(
                {
                    **{name: document[name] for name in FIELDS},
                    "job_json": document["job"],
                    "artifact_id": document["model"]["artifact_id"],
                }
            )
        except ValidationError as e:
            fields = sorted({".".join(map(str, x["loc"])) or "the whole" for x in e.errors(include_input=False)})
            raise ValueError(", ".join(fields)[:300]) from None


FIELDS: Final = ("time", "writer", "job", "course", "statements", "unstated", "site_level_report")
"""Facts that stand in a report under their own name."""


def _usable(result: FederatedResult, course: Course) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    statements, unstated = {}, {s: why[:_SHOWN] for s, why in result.unstated.items()}
    for site, envelope in sorted(result.statements.items()):
        try:
            read_statement(result.job, site, envelope, digest=result.job.digest(), course=course)
            statements[site] = envelope
        except TGTinkerError as e:
            unstated[site] = f"its statement cannot be used: {e.message}"[:_SHOWN]
    silent = {s: "" for s in result.job.roster if s not in statements and s not in unstated}
    return statements, dict(sorted({**unstated, **silent}.items()))


def _envelope(job: Job, report: bytes | None) -> dict[str, Any] | None:
    if job.sites is None:
        if report is None:
            return None
        raise _refused("this job has no privacy of whole sites, so no report on their ledger belongs to it")
    if report is None:
        raise _refused(
            "this job protects whole sites, and the report on their ledger is missing: fetch it from the "
            f"coordinator's server with `tg-tinker privacy report {ledger_of(job)}` and give it"
        )
    try:
        envelope = json.loads(report)
    except ValueError:
        envelope = None
    if not isinstance(envelope, dict):
        raise _refused("the report on the sites' ledger is not a signed report")
    return envelope


def _refused(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, field="site_level_report", constraint="the report of this job's sites")

"""The course of a job as values: who joined, who answered in a round, what was released, how it ended.

Nothing here reads a clock, a file or a socket. A course is frozen; each event makes the next one:

    joining ──► training ──► finished
       └───────────┴───────► failed (why)

A round is one or more attempts. Each asks sites; the first word of a site in an attempt stands; a round with enough
updates may be released, and nothing else moves the job on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tg_tinker.errors import FederationRefusedError, InvalidRequestError

Phase = Literal["joining", "training", "finished", "failed"]
FOR_GOOD = ("policy", "expired")
"""Reasons after which a site is not asked again: neither will change."""
MOST_SKIPPED = 3
_SHOWN = 300  # characters of what a site said


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Answer(_Value):
    """What became of one request to a site.

    Attributes:
        kind: "update": a good one; "refused": by the site; "bad_update": by us; "no_answer": none in time.
        reason: one of ``FederationRefusedError``'s, where something was refused.
        message: for people; text of a site is not to be trusted.
    """

    kind: Literal["update", "refused", "bad_update", "no_answer"]
    reason: str = ""
    message: str = ""

    @classmethod
    def refused(cls, reason: object, message: object) -> Self:
        """A site's refusal, with what it said made fit to show."""
        return cls(kind="refused", reason=_tidy(reason)[:40], message=_tidy(message))

    @classmethod
    def bad(cls, error: FederationRefusedError) -> Self:
        """An update that we refuse."""
        return cls(kind="bad_update", reason=error.reason, message=_tidy(error.message))

    @classmethod
    def none(cls, why: object) -> Self:
        """No reply, or none that counts."""
        return cls(kind="no_answer", message=_tidy(why))


class RoundRecord(_Value):
    """A released round.

    Attributes:
        attempts: how often sites were asked.
        answers: last word of every site that was asked; ``None`` where telling who took part would tell who was
            drawn, which the privacy of sites rests on.
        updates: how many went into the aggregate; ``None`` likewise.
        artifact_id: of the adapter after the round, at the coordinator's server.
        weights_digest: of that adapter.
        skipped: why the adapter stayed as it was: a masked sum that was opened in part and cannot be again.
        metrics: what the evaluation of the released adapter found.
    """

    round: int = Field(ge=1)
    attempts: int = Field(ge=1)
    answers: dict[str, Answer] | None
    updates: int | None
    artifact_id: str
    weights_digest: str
    skipped: str = ""
    metrics: dict[str, float] = Field(default_factory=dict)


class Course(_Value):
    """Where a job stands.

    Attributes:
        rounds: of the job.
        roster: every site that the job names.
        quorum: fewer members than this do not start.
        min_updates: fewer updates than this do not make a round; 0 under site-level privacy, where a round that
            stops for want of updates would tell who was drawn.
        max_attempts: how often a round is tried before the job fails, counted anew after a restart.
        public: whether it may be told who took part in a round. Where not, no answer to a round makes a site leave.
        members: sites that accepted the job, in order of their names.
        left: sites that refused, with their last word. They are not asked again.
        released: rounds whose adapter is out, from the first.
        attempt: number of the attempt under way, 0 before the first; never used twice in a round.
        tries: attempts since the last start.
        asked: sites of the attempt under way.
        answers: last word of each site in the round under way.
        opened: sites over whose masked updates shares were asked for: with these weights, these and no others.
        ignored: late, repeated or uncalled-for replies of the whole job.
        why: why it failed.
    """

    rounds: int = Field(ge=1)
    roster: tuple[str, ...] = Field(min_length=1)
    quorum: int = Field(ge=1)
    min_updates: int = Field(ge=0)
    max_attempts: int = Field(3, ge=1)
    public: bool = True
    phase: Phase = "joining"
    members: tuple[str, ...] = ()
    left: dict[str, Answer] = Field(default_factory=dict)
    released: tuple[RoundRecord, ...] = ()
    attempt: int = Field(0, ge=0)
    tries: int = Field(0, ge=0)
    asked: tuple[str, ...] = ()
    answers: dict[str, Answer] = Field(default_factory=dict)
    opened: tuple[str, ...] = ()
    ignored: int = Field(0, ge=0)
    why: str = ""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        known = set(self.roster)
        numbered = [r.round for r in self.released] == list(range(1, len(self.released) + 1))
        if not numbered or len(self.released) > self.rounds:
            raise ValueError("released rounds do not follow each other")
        if not {*self.members, *self.left, *self.asked, *self.answers} <= known:
            raise ValueError("a site is not on the roster")
        if set(self.members) & set(self.left):
            raise ValueError("a site is a member and left")
        if (self.phase == "finished") != (len(self.released) == self.rounds) or (self.phase == "failed") != bool(
            self.why
        ):
            raise ValueError(f"the phase {self.phase!r} does not fit what was released")
        return self

    # What can be asked of it.

    @property
    def round(self) -> int:
        """The round under way, from 1; after the last one it stays there."""
        return min(len(self.released) + 1, self.rounds)

    @property
    def over(self) -> bool:
        """Whether it ended."""
        return self.phase in ("finished", "failed")

    @property
    def unheard(self) -> tuple[str, ...]:
        """Sites that neither accepted nor refused."""
        return tuple(s for s in self.roster if s not in self.members and s not in self.left)

    @property
    def with_update(self) -> tuple[str, ...]:
        """Sites whose update of this round is in hand."""
        return tuple(sorted(s for s, a in self.answers.items() if a.kind == "update"))

    @property
    def waiting_for(self) -> tuple[str, ...]:
        """Sites of this attempt without a word yet."""
        return tuple(s for s in self.asked if s not in self.answers)

    @property
    def releasable(self) -> bool:
        """Whether the round may be released: all who were asked answered or are given up, and enough sent updates."""
        started = self.phase == "training" and self.tries > 0 and not self.waiting_for
        return started and len(self.with_update) >= self.min_updates

    # Joining.

    def accepted(self, site: str) -> Self:
        """A site accepts the job. Possible until the end: a site that was away joins between rounds."""
        self._known(site)
        if self.over or site in self.left or site in self.members:
            return self._but(ignored=self.ignored + 1)
        return self._but(members=tuple(sorted((*self.members, site))))

    def leaves(self, site: str, answer: Answer) -> Self:
        """A site refuses the job, for good."""
        self._known(site)
        if self.over or site in self.left:
            return self._but(ignored=self.ignored + 1)
        members = tuple(m for m in self.members if m != site)
        return self._but(members=members, left={**self.left, site: answer})

    def begin(self) -> Self:
        """Close the joining: training, or failed where too few accepted."""
        self._in("joining")
        if len(self.members) >= self.quorum:
            return self._but(phase="training")
        said = _list({**{s: Answer.none("did not answer") for s in self.unheard}, **self.left})
        return self.fail(f"{len(self.members)} of {len(self.roster)} sites joined, {self.quorum} are needed{said}")

    # Rounds.

    def ask(self, sites: Iterable[str], *, again: bool = False) -> Self:
        """Begin an attempt.

        Args:
            again: updates of earlier attempts do not stand, because a masked one fits its own attempt only.
        """
        self._in("training")
        asked = tuple(sorted(set(sites)))
        if not set(asked) <= set(self.members):
            raise InvalidRequestError("only members can be asked", field="sites", constraint="members")
        kept = {} if again else {s: a for s, a in self.answers.items() if a.kind == "update" or s not in asked}
        return self._but(
            attempt=self.attempt + 1,
            tries=self.tries + 1,
            asked=tuple(s for s in asked if s not in kept),
            answers=kept,
        )

    def answer(self, site: str, answer: Answer, *, round: int, attempt: int) -> Self:
        """A site's word. Late, repeated and uncalled-for ones change nothing but a count."""
        current = self.phase == "training" and (round, attempt) == (self.round, self.attempt)
        if not current or site not in self.asked or site in self.answers:
            return self._but(ignored=self.ignored + 1)
        after = self._but(answers={**self.answers, site: answer})
        if not self.public:  # that it left would tell that it was drawn
            return after
        return after.leaves(site, answer) if answer.kind == "refused" and answer.reason in FOR_GOOD else after

    def open(self, sites: Iterable[str]) -> Self:
        """Shares of the masks of these sites' updates are about to be asked for."""
        self._in("training")
        return self._but(opened=tuple(sorted(sites)))

    def close(self, why: str = "") -> Self:
        """Give up on whoever has not answered; failed if that was the last attempt and there are too few updates.

        Args:
            why: what else kept the attempt from being released.
        """
        self._in("training")
        missing = {s: Answer.none("no reply in time") for s in self.waiting_for}
        after = self._but(answers={**self.answers, **missing})
        if after.releasable or after.tries < after.max_attempts or after.opened:
            return after
        return after.fail(
            f"round {self.round} has {len(after.with_update)} updates and needs {self.min_updates}, after "
            f"{self.attempt} attempts{f'; {why}' if why else ''}{_list(after.answers)}"
        )

    def release(self, *, artifact_id: str, weights_digest: str) -> Self:
        """The adapter after this round is out: on to the next, or finished."""
        if not self.releasable:
            raise InvalidRequestError("this round cannot be released", field="round", constraint="enough updates")
        return self._recorded(artifact_id, weights_digest, "")

    def skip(self, why: str, *, artifact_id: str, weights_digest: str) -> Self:
        """Leave the adapter as it is and go on: the only way once masks were opened and their sum was lost.

        Failed where that happens several times in a row.
        """
        self._in("training")
        if not self.opened:
            raise InvalidRequestError("this round can be tried again", field="round", constraint="opened")
        if len(self.released) >= MOST_SKIPPED and all(r.skipped for r in self.released[-MOST_SKIPPED:]):
            return self.fail(f"{MOST_SKIPPED} rounds in a row were lost, and now round {self.round}: {why}")
        return self._recorded(artifact_id, weights_digest, _tidy(why))

    def evaluated(self, metrics: Mapping[str, float]) -> Self:
        """What the evaluation of the last released adapter found."""
        last = self.released[-1].model_copy(update={"metrics": dict(metrics)})
        return self._but(released=(*self.released[:-1], last))

    def fail(self, why: str) -> Self:
        """End without the rounds that are left; what was released stays."""
        if self.over:
            raise InvalidRequestError(f"the job is {self.phase}", field="phase", constraint="not over")
        return self._but(phase="failed", why=why)

    def resumed(self) -> Self:
        """After a restart: updates in memory are gone, so the round is asked again, under a new attempt."""
        if self.phase == "finished":
            return self
        began = self.phase == "training" or (self.attempt + len(self.released) and len(self.members) >= self.quorum)
        return self._but(phase="training" if began else "joining", why="", tries=0, asked=(), answers={})

    def _recorded(self, artifact_id: str, weights_digest: str, skipped: str) -> Self:
        record = RoundRecord(
            round=self.round,
            attempts=self.attempt,
            answers=dict(self.answers) if self.public else None,
            updates=(0 if skipped else len(self.with_update)) if self.public else None,
            artifact_id=artifact_id,
            weights_digest=weights_digest,
            skipped=skipped,
        )
        released = (*self.released, record)
        phase: Phase = "finished" if len(released) == self.rounds else "training"
        # A lost round leaves the weights as they are, and sites know by the weights which sum they opened.
        opened = self.opened if skipped else ()
        return self._but(released=released, phase=phase, attempt=0, tries=0, asked=(), answers={}, opened=opened)

    def _but(self, **changes: Any) -> Self:
        return self.model_copy(update=changes)

    def _known(self, site: str) -> None:
        if site not in self.roster:
            raise FederationRefusedError(f"site {site[:80]!r} is not on the roster", reason="unknown_site")

    def _in(self, phase: Phase) -> None:
        if self.phase != phase:
            raise InvalidRequestError(f"the job is {self.phase}, not {phase}", field="phase", constraint=phase)


def _tidy(text: object) -> str:
    return "".join(c if c.isprintable() else " " for c in str(text))[:_SHOWN]


def _list(answers: Mapping[str, Answer]) -> str:
    said = [
        f"{site}: {a.kind}{f' ({a.reason})' if a.reason else ''} {a.message}".rstrip()
        for site, a in sorted(answers.items())
        if a.kind != "update"
    ]
    return "; ".join(["", *said])

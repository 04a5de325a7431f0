"""One process's work on a job: invites sites, goes through the rounds, collects the statements."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from tg_tinker.errors import DPBudgetExceededError, FederationRefusedError
from tg_tinker.federated.adapter_store import AdapterStore, Promise, Weights
from tg_tinker.federated.aggregation import Moments, checked_update, combined
from tg_tinker.federated.closing import collected, missing_statements, result_of
from tg_tinker.federated.correspondence import Correspondence, Word
from tg_tinker.federated.link import CoordinatorLink
from tg_tinker.federated.masked_round import masked_attempt
from tg_tinker.federated.result import FederatedResult, promise_of
from tg_tinker.federated.rounds import Answer, Course
from tg_tinker.federated.site_privacy import SiteMechanism
from tg_tinker.federated.state import Saved, StateFolder
from tg_tinker.federated.surroundings import Progress, Released, Surroundings
from tg_tinker.federated.updates import flatten, layout, size, trained_names, unflatten, weights_digest

LEAST_JOIN_S = 30.0
"""A site looks at its server before it accepts a job, so it has this long to answer."""
MOST_INVITATIONS = 3  # after the first round began: a site that hangs must not hold up every round


class JobRun:
    """Holds the folder until it is done."""

    def __init__(
        self,
        around: Surroundings,
        folder: StateFolder,
        link: CoordinatorLink,
        saved: Saved,
        moments: Moments,
        weights: Weights,
    ) -> None:
        self._around, self._folder, self._link = around, folder, link
        self._job, self._digest = saved.job, saved.job.digest()
        self._saved, self._moments, self._weights = saved, moments, weights
        self._letters = Correspondence(saved.job, around.key)
        self._store = AdapterStore(around.service, saved.job)
        self._sites = SiteMechanism(around.service, saved.job) if saved.job.sites is not None else None
        self._updates: dict[str, Mapping[str, npt.NDArray[np.float32]]] = {}
        self._invited: Counter[str] = Counter()

    @property
    def _course(self) -> Course:
        return self._saved.course

    def to_the_end(self) -> FederatedResult:
        """See ``Coordinator.run``."""
        with self._folder:
            self._put(self._course.resumed())
            if not self._course.released and self._course.phase != "finished":
                self._look(0)
            if self._course.phase == "joining":
                self._join()
            while not self._course.over:
                self._round()
            return self._end(ask=self._course.phase == "finished")

    def given_up(self) -> FederatedResult:
        """See ``Coordinator.finish``."""
        with self._folder:
            if not self._course.over:
                self._put(self._course.fail("given up by the coordinator"))
            return self._end(ask=True)

    # Joining.

    def _join(self) -> None:
        deadline = self._around.clock() + self._around.config.join_timeout_s
        while not self._expired():
            self._invite(self._course.unheard, deadline - self._around.clock())
            if not self._course.unheard or self._around.clock() >= deadline:
                self._put(self._course.begin())
                if self._course.phase == "failed":
                    self._failed("too_few_sites")
                return
            self._around.sleep(self._around.config.pause_s)

    def _invite(self, sites: Iterable[str], patience_s: float) -> None:
        """Ask sites that are connected to accept the job, and wait so long for one that says nothing."""
        course = self._course
        facts = {"job": self._job.model_dump(mode="json")}
        timeout_s = min(max(patience_s, LEAST_JOIN_S), self._job.round_timeout_s)
        connected = sorted(set(sites) & set(self._link.sites()))
        words = self._letters.ask(self._link, connected, "join", timeout_s=timeout_s, facts=facts)
        for site, word in words.items():
            if word.reply is not None and word.reply.facts.get("accepted") is True:
                course = course.accepted(site)
                self._tell("joined", site=site)
            elif word.answer.kind == "refused":
                course = course.leaves(site, word.answer)
                self._tell("left", site=site, answer=word.answer)
        if course != self._course:
            self._put(course)

    # Rounds.

    def _round(self) -> None:
        """One attempt at the round under way."""
        if self._expired():
            return
        if self._course.tries:
            self._around.sleep(self._around.config.pause_s)
        late = [s for s in self._course.unheard if self._invited[s] < MOST_INVITATIONS]
        self._invited.update(late)
        self._invite(late, self._around.config.join_timeout_s)
        sites = set(self._course.members)
        if self._sites is not None:
            sites &= set(self._sites.draw(self._course.roster))
        if self._course.opened:
            sites &= set(self._course.opened)
        # On disk before anybody is asked: no attempt has the number of an earlier one.
        self._put(self._course.ask(sites, again=self._job.masking is not None))
        self._tell("asked")
        if self._job.masking is None:
            self._plain()
        else:
            self._masked()

    def _plain(self) -> None:
        words = self._ask_for_updates()
        factor = self._job.frozen_factor(self._course.round)
        course = self._course
        for site, word in words.items():
            answer = word.answer
            if word.reply is not None:
                try:
                    limit = self._around.config.max_update_norm
                    update = checked_update(word.reply.arrays, self._weights, factor, max_norm=limit)
                    self._updates[site] = update
                except FederationRefusedError as e:
                    answer = Answer.bad(e)
                    if course.public:  # as many notes as bad updates would tell of the draw
                        self._note("round_refused", reason=e.reason)
            course = course.answer(site, answer, round=course.round, attempt=course.attempt)
            if course.public:
                self._tell("answered", site=site, answer=answer)
        course = course.close()
        if not course.releasable:
            self._put(course)
            if course.phase == "failed":
                self._failed("too_few_sites")
            return
        self._saved = self._saved.model_copy(update={"course": course})
        updates, bound = [self._updates[site] for site in course.with_update], self._saved.bound
        if self._sites is not None and bound is not None:
            shapes = layout({name: self._weights[name] for name in trained_names(self._weights, factor)})
            rows = {site: flatten(self._updates[site]) for site in course.with_update}
            try:
                mean, bound = self._sites.release(rows, size=size(shapes), bound=bound)
            except DPBudgetExceededError as e:
                self._put(course.fail(f"the budget of the sites is spent: {e.message}"))
                self._failed("")
                return
            updates = [unflatten(mean, shapes)]
        self._release(course, updates, bound)

    def _ask_for_updates(self) -> dict[str, Word]:
        course = self._course
        return self._letters.ask(
            self._link,
            course.asked,
            "train",
            timeout_s=self._job.round_timeout_s,
            place=(course.round, course.attempt),
            arrays=self._weights,
        )

    def _masked(self) -> None:
        course = self._course
        factor = self._job.frozen_factor(course.round)
        shapes = layout({name: self._weights[name] for name in trained_names(self._weights, factor)})
        found = masked_attempt(
            self._job,
            self._letters,
            self._link,
            sites=course.asked,
            place=(course.round, course.attempt),
            weights=self._weights,
            size=size(shapes),
            opened=course.opened,
            before_open=lambda stayed: self._put(self._course.open(stayed)),
        )
        course = self._course
        for site, answer in found.answers.items():
            course = course.answer(site, answer, round=course.round, attempt=course.attempt)
            self._tell("answered", site=site, answer=answer)
        course = course.close(found.why)
        if found.mean is not None and course.releasable:
            self._saved = self._saved.model_copy(update={"course": course})
            self._release(course, [unflatten(found.mean.mean, shapes)], None)
            return
        if course.opened and course.tries >= course.max_attempts:
            why = found.why or "too few updates"
            course = course.skip(why, artifact_id=self._saved.adapter, weights_digest=self._saved.adapter_digest)
            self._note("round_failed", round_=self._course.round, reason="too_few_sites")
            self._tell("skipped", message=why)
        self._put(course)
        if course.phase == "failed":
            self._failed("too_few_sites")

    def _release(
        self, course: Course, updates: list[Mapping[str, npt.NDArray[np.float32]]], bound: float | None
    ) -> None:
        """Bring out the adapter after a round."""
        round_ = course.round
        try:
            weights, moments = combined(
                self._job.strategy,
                self._weights,
                updates,
                factor=self._job.frozen_factor(round_),
                round_=round_,
                moments=self._moments,
            )
        except FederationRefusedError as e:
            self._put(course.fail(e.message))
            self._failed(e.reason)
            return
        digest = weights_digest(weights)
        artifact = self._store.keep(weights, round_, self._promised())
        self._note("round_released", round_=round_)
        self._saved = self._folder.save(
            self._saved.model_copy(
                update={
                    "course": course.release(artifact_id=artifact, weights_digest=digest),
                    "adapter": artifact,
                    "adapter_digest": digest,
                    "bound": bound,
                }
            ),
            moments,
        )
        self._weights, self._moments, self._updates = weights, moments, {}
        self._look(round_)

    def _look(self, round_: int) -> None:
        """Evaluate what was released. An evaluation that fails stops the process and loses nothing."""
        metrics: dict[str, float] = {}
        if self._around.evaluate is not None:
            seen = Released(round=round_, artifact_id=self._saved.adapter, weights=self._weights)
            metrics = {name: float(value) for name, value in self._around.evaluate(seen).items()}
            if round_:
                self._put(self._course.evaluated(metrics))
            else:
                self._saved = self._folder.save(self._saved.model_copy(update={"first_metrics": metrics}))
        if round_:
            self._tell("released", round_=round_, metrics=metrics)

    # The end.

    def _end(self, *, ask: bool) -> FederatedResult:
        if ask:
            missing = missing_statements(self._saved)
            if missing:
                self._saved = self._folder.save(collected(self._saved, self._letters, self._link, missing))
            self._note("job_finished")
        result = result_of(self._saved, self._weights, self._sites, ended=self._around.now())
        self._folder.write_result(result.model_dump_json(indent=1))
        if self._sites is not None:
            self._sites.close()
        self._tell(result.status, message=result.why)
        return result

    # Small things.

    def _promised(self) -> Promise:
        records = promise_of(self._job)
        if records.epsilon is not None and records.delta is not None and records.unit is not None:
            return records.epsilon, records.delta, records.unit
        if self._sites is not None and self._job.sites is not None:
            return self._sites.epsilon(), self._job.sites.target_delta, "site"
        return float("inf"), 0.5, "datum"

    def _expired(self) -> bool:
        if self._around.now() < self._job.expires:
            return False
        self._put(self._course.fail(f"the job expired at {self._job.expires.isoformat()}"))
        self._failed("expired")
        return True

    def _failed(self, reason: str) -> None:
        self._note("round_failed", round_=self._course.round, reason=reason)

    def _put(self, course: Course) -> None:
        self._saved = self._folder.save(self._saved.model_copy(update={"course": course}))

    def _note(self, event: str, *, round_: int | None = None, reason: str = "") -> None:
        number = 0 if round_ is None else round_
        self._around.service.note_federation(event, job=self._digest, round=number, reason=reason)

    def _tell(
        self,
        what: str,
        *,
        round_: int | None = None,
        site: str = "",
        answer: Answer | None = None,
        metrics: Mapping[str, float] | None = None,
        message: str = "",
    ) -> None:
        course = self._course
        self._around.progress(
            Progress(
                what=what,
                round=course.round if round_ is None else round_,
                attempt=course.attempt,
                site=site,
                answer=answer,
                metrics=metrics,
                message=message,
            )
        )

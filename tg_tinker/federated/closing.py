"""The end of a job: sites state what they spent, and the coordinator writes down what became of it."""

from __future__ import annotations

import json
from datetime import datetime

from tg_tinker.federated.adapter_store import Weights
from tg_tinker.federated.correspondence import Correspondence, Word
from tg_tinker.federated.job import Job
from tg_tinker.federated.link import CoordinatorLink
from tg_tinker.federated.result import FederatedResult, SiteLevel, promise_of, trust_of
from tg_tinker.federated.site_privacy import SiteMechanism, check_feasible, trained_sizes
from tg_tinker.federated.state import Saved
from tg_tinker.federated.statement import verify_statement

LARGEST_STATEMENT = 4 * 2**20  # characters
LONGEST_FINISH_S = 300.0
"""For a statement. A site that is still at work on a round is asked again when the coordinator is run again."""
WITHHELD = "withheld: it names the rounds that the site was drawn for, on which the privacy of sites rests"


def missing_statements(saved: Saved) -> list[str]:
    """Sites that took part and have not stated what they spent."""
    took_part = {s for r in saved.course.released for s, a in (r.answers or {}).items() if a.kind == "update"}
    return sorted(({*saved.course.members} | took_part) - set(saved.statements))


def collected(saved: Saved, letters: Correspondence, link: CoordinatorLink, sites: list[str]) -> Saved:
    """The state with the statements of these sites, or why they gave none."""
    statements, unstated = dict(saved.statements), {}
    timeout_s = min(saved.job.round_timeout_s, LONGEST_FINISH_S)
    for site, word in letters.ask(link, sites, "finish", timeout_s=timeout_s).items():
        if word.reply is None:
            unstated[site] = word.answer.message or word.answer.reason
        elif _is_stated(word, saved.job, site):
            statements[site] = word.reply.facts["statement"]
        else:
            unstated[site] = "what it sent is no statement on this job, signed by its key"
    return saved.model_copy(update={"statements": statements, "unstated": unstated})


def _is_stated(word: Word, job: Job, site: str) -> bool:
    assert word.reply is not None
    statement = word.reply.facts.get("statement")
    try:
        if not isinstance(statement, dict) or len(json.dumps(statement)) > LARGEST_STATEMENT:
            return False
        said = verify_statement(statement, job.roster[site])
    except Exception:  # noqa: BLE001 - whatever a site sends, it alone goes without a statement
        return False
    return (said.job, said.site) == (job.digest(), site)


def result_of(saved: Saved, weights: Weights, sites: SiteMechanism | None, *, ended: datetime) -> FederatedResult:
    """What a job came to."""
    job, course = saved.job, saved.course
    level = None
    if job.sites is not None and sites is not None and saved.bound is not None:
        level = SiteLevel(
            dataset_id=sites.dataset_id,
            epsilon=sites.epsilon(),
            delta=job.sites.target_delta,
            bound=saved.bound,
            numbers=check_feasible(job, trained_sizes(job, weights)),
        )
    drawn = job.sites is not None and job.sites.sample_rate < 1
    return FederatedResult(
        job=job,
        job_digest=job.digest(),
        status="finished" if course.phase == "finished" else "failed",
        why=course.why,
        members=course.members,
        left=course.left,
        unheard=course.unheard,
        rounds=course.released,
        first_metrics=saved.first_metrics,
        ignored=course.ignored,
        artifact_id=saved.adapter,
        weights_digest=saved.adapter_digest,
        # What a drawn site spent would tell how often it was drawn: its own server holds it to the job's target.
        records=promise_of(job, {} if drawn else saved.statements),
        sites=level,
        statements={} if drawn else saved.statements,
        unstated={**saved.unstated, **(dict.fromkeys(saved.statements, WITHHELD) if drawn else {})},
        trust=trust_of(job),
        ended=ended,
    )

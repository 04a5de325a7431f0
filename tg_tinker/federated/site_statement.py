"""A site's closing statement, made from its server's report and from what was agreed; it tells no size."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime

from tg_tinker.federated.site_budget import as_public, epsilon_of_counts
from tg_tinker.federated.site_state import JobRecord
from tg_tinker.federated.statement import Accounting, SiteStatement
from tg_tinker.ledger.history import History
from tg_tinker.ledger.releases import Release, histogram
from tg_tinker.reports.statement import number, rounded_up


def statement_of(
    record: JobRecord,
    history: History,
    *,
    site: str,
    charged: Sequence[Release],
    rounds: list[int],
    log: tuple[str, str],
    report: bytes,
    disclose: bool,
    now: datetime,
) -> SiteStatement:
    """The closing statement on a job.

    Its epsilons are computed as if the data had only the public number of units. So they tell no size, and are no
    less than the true ones; what all of the data spent is still within the target that its ledger enforces.

    Args:
        charged: what the job was charged for.
        log: origin and checkpoint.
        report: the signed report that ``history`` is of.
        disclose: whether to say what epsilon was computed from.
    """
    job, terms = record.job, history.in_force
    delta = terms.target_delta if job.records is None else job.records.target_delta
    accounting = None
    units, told = history.slots or record.public_units, record.public_units
    spent, spent_in_all = (
        epsilon_of_counts(as_public(histogram(releases), units, told), at)
        for releases, at in ((charged, delta), (history.releases, terms.target_delta))
    )
    if disclose and record.noise_multiplier is not None:
        accounting = Accounting(
            noise_multiplier=number(record.noise_multiplier),
            sample_rate=number(job.batch_size / told),
            steps=len(charged),
        )
    return SiteStatement(
        job=record.digest,
        site=site,
        time=now.astimezone(UTC).isoformat(timespec="seconds"),
        rounds=tuple(rounds),
        unit=terms.unit,
        epsilon=rounded_up(spent, 2),
        delta=number(delta),
        target_epsilon="inf" if job.records is None else number(job.records.target_epsilon),
        dataset_epsilon=rounded_up(max(history.epsilon_spent, min(spent_in_all, terms.target_epsilon)), 2),
        dataset_delta=number(terms.target_delta),
        dataset_target_epsilon=number(terms.target_epsilon),
        public_units=told,
        log_origin=log[0],
        log_checkpoint=log[1],
        report_sha256=hashlib.sha256(report).hexdigest(),
        accounting=accounting,
    )

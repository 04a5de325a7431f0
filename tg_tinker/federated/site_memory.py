"""What a site's own server remembers of a job, whatever became of the state folder: its ledger, marked runs, notes.

The ledger and the audit log are append-only, and the client holds the server to its log. So what a job spent here is
read from them, never from the state folder alone, of which an old copy may have been put back.
"""

from __future__ import annotations

from tg_tinker.federated.site_state import JobRecord, SiteState
from tg_tinker.ledger.history import History, read_history
from tg_tinker.ledger.releases import Release
from tg_tinker.service_client import ServiceClient
from tg_tinker.types import AuditLogEntry

MARK = "federated_run"
"""In a run's metadata: whose it is, as ``mark_of`` writes it."""
_LISTED = 1000  # newest runs; older ones and deleted ones are judged by what they were charged for
_NOTES = 10_000  # newest notes of one operation


def mark_of(digest: str, factor: str) -> str:
    """The mark of a job's run in which this factor is frozen; "" for none."""
    return f"{digest}/{factor}"


def history_of(service: ServiceClient, dataset_id: str) -> History:
    """What the ledger of a dataset tells."""
    ledger = service.get_privacy_ledger(dataset_id)
    return read_history(dataset_id, (entry.body for entry in ledger.entries))


def runs_of(service: ServiceClient, state: SiteState, digest: str) -> tuple[set[str], set[str]]:
    """Ids of the runs that are known to be the job's, and of those that are known to be none of it."""
    mine, others = set(state.run_ids(digest)), state.other_run_ids(digest)
    for info in service.list_training_clients(limit=_LISTED):
        marked = str(info.metadata.get(MARK, "")).startswith(mark_of(digest, ""))
        (mine if marked else others).add(info.id)
    return mine, others - mine


def charges_of_job(service: ServiceClient, state: SiteState, record: JobRecord, history: History) -> list[Release]:
    """What a job was charged for, settled or not, over every run that is its own.

    Nobody can tell any more whose a deleted run was: where it cost what a step of the job costs, it counts.
    """
    mine, others = runs_of(service, state, record.digest)
    price = (0.0, 1.0)
    if record.noise_multiplier is not None and history.slots is not None:
        price = (record.noise_multiplier, record.job.batch_size / history.slots)
    return [
        charge.release
        for charge in history.charges
        if charge.run_id in mine
        or (charge.run_id not in others and (charge.release.noise_multiplier, charge.release.sample_rate) == price)
    ]


def knows(service: ServiceClient, state: SiteState, digest: str) -> bool:
    """Whether this server agreed to a job or trained for it."""
    return noted(service, digest) or bool(runs_of(service, state, digest)[0])


def noted(service: ServiceClient, digest: str) -> bool:
    """Whether the audit log has the agreement to a job."""
    return any(e.facts.get("job") == digest for e in _notes(service, "join_accepted"))


def rounds_noted(service: ServiceClient, digest: str) -> set[int]:
    """Rounds of a job that the audit log says were trained."""
    return {
        int(entry.facts["round"])
        for entry in _notes(service, "round_trained")
        if entry.facts.get("job") == digest and entry.facts.get("round", "").isdigit()
    }


def _notes(service: ServiceClient, event: str) -> list[AuditLogEntry]:
    return service.get_audit_logs(operation=f"federation.{event}", limit=_NOTES)

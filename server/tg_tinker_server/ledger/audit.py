"""The audit log: one hash-chained record per operation, with ids, sizes and keyed hashes, never content."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from tg_tinker.errors import ServerError
from tg_tinker.ledger import AUDIT_DOMAIN, START, ChainEntry
from tg_tinker_server.ledger import log
from tg_tinker_server.store import audit_rows
from tg_tinker_server.store.database import Database, Transaction

DP_METRICS = frozenset({"noise_applied", "epsilon_spent", "total_epsilon", "delta"})
FACTS = frozenset(
    {
        "recipients",
        "digest",
        "origin",
        "key_id",
        "dataset_id",
        "epsilon",
        "delta",
        "audit_digest",
        "step",
        "job",
        "round",
        "reason",
    }
)
_PAGE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRecord:
    """One operation that ended.

    Attributes:
        request_hash: keyed; a plain hash of a small batch can be guessed.
        dp_metrics: epsilon figures as decimal strings; nothing that depends on the data.
        actor: id of the API key that asked, or ``"operator"`` for a command on the server's machine.
        facts: what else may be public, of ``FACTS``, e.g. the recipients of an export.
    """

    operation: str
    run_id: str
    request_hash: str
    request_bytes: int
    artifact_ids: tuple[str, ...]
    started: datetime
    completed: datetime
    success: bool
    error_code: str
    dp_metrics: Mapping[str, str | bool] | None
    actor: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.started.tzinfo is None or self.completed.tzinfo is None:
            raise ValueError("an audit record needs times with a timezone")
        private = set(self.dp_metrics or ()) - DP_METRICS
        if private:
            raise ValueError(f"the audit log takes no {', '.join(sorted(private))}: only what was paid may be kept")
        unknown = set(self.facts) - FACTS
        if unknown:
            raise ValueError(f"the audit log takes no fact {', '.join(sorted(unknown))}: nothing else may be public")


@dataclass(frozen=True, slots=True)
class AuditLog:
    """Appends and reads records of tenants."""

    db: Database

    def append(self, tenant: str, record: AuditRecord) -> Future[None]:
        """Append in order of calls; durable when the future is done. A failed write makes the database unhealthy."""
        return self.db.submit(lambda tx: self.insert(tx, tenant, record))

    @staticmethod
    def insert(tx: Transaction, tenant: str, record: AuditRecord) -> None:
        """Append within a transaction: the record is there if, and only if, what it tells of is."""
        body: dict[str, Any] = {
            "operation": record.operation,
            "training_client_id": record.run_id,
            "request_hash": record.request_hash,
            "request_bytes": record.request_bytes,
            "artifact_ids": list(record.artifact_ids),
            "started": record.started.astimezone(UTC).isoformat(),
            "completed": record.completed.astimezone(UTC).isoformat(),
            "success": record.success,
            "error_code": record.error_code,
            "dp_metrics": None if record.dp_metrics is None else dict(record.dp_metrics),
        }

        if record.actor:
            body["actor"] = record.actor
        if record.facts:
            body["facts"] = dict(record.facts)
        position, head = audit_rows.last_record(tx, tenant) or (-1, START)
        entry = ChainEntry.make(AUDIT_DOMAIN, body, position=position + 1, prev_hash=head)
        text = entry.body_json()
        audit_rows.insert_record(
            tx,
            audit_rows.AuditRow(
                tenant=tenant,
                position=entry.position,
                body_json=text,
                prev_hash=entry.prev_hash,
                record_hash=entry.entry_hash,
                leaf_index=log.append(tx, tenant, text),
            ),
        )

    def query(
        self,
        tenant: str,
        *,
        run_id: str = "",
        operation: str = "",
        start: datetime | None = None,
        end: datetime | None = None,
        limit: int = 100,
    ) -> list[ChainEntry]:
        """The newest ``limit`` records that fit, oldest of them first. ``start`` and ``end`` bound ``started``."""

        def fits(body: Mapping[str, object]) -> bool:
            began = datetime.fromisoformat(str(body["started"]))
            return (
                (not run_id or body["training_client_id"] == run_id)
                and (not operation or body["operation"] == operation)
                and (start is None or began >= start)
                and (end is None or began <= end)
            )

        def read(tx: Transaction) -> list[ChainEntry]:
            found: list[ChainEntry] = []
            before: int | None = None
            while len(found) < limit:
                page = audit_rows.records(tx, tenant, before=before, limit=_PAGE)
                if not page:
                    break
                before = page[-1].position
                found += [e for e in map(_entry, page) if fits(e.body)]
            return found[:limit][::-1]

        self.db.write(_wait)  # records of operations that have ended may still stand in the writer's queue
        return self.db.read(read)


def _wait(tx: Transaction) -> None:
    """Writes nothing: being run means that everything submitted before is on disk."""


def _entry(row: audit_rows.AuditRow) -> ChainEntry:
    try:
        return ChainEntry(dict(json.loads(row.body_json)), row.record_hash)
    except (ValueError, TypeError) as e:
        raise ServerError(
            f"the audit log cannot be read at position {row.position}; restore the database",
            details={"position": row.position},
        ) from e

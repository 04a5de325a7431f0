"""Notes in the audit log of what became of a federated job or a round, as a party of it says."""

from __future__ import annotations

from dataclasses import dataclass

from tg_tinker.errors import FederationRefusedError
from tg_tinker.types.federation import check_note
from tg_tinker_server.ledger.audit import AuditLog, AuditRecord
from tg_tinker_server.service.caller import Caller
from tg_tinker_server.service.durability import now
from tg_tinker_server.service.executors import Executors


@dataclass(frozen=True, slots=True)
class FederationNotes:
    """Takes notes. Every value is of a list, a digest or a number: nothing about anybody fits in."""

    audit: AuditLog
    executors: Executors

    async def note(self, caller: Caller, event: str, *, job: str, round_: int, reason: str) -> None:
        """Append a record ``federation.<event>``; durable on return.

        Raises:
            InvalidRequestError: a value that is not of the lists.
        """
        check_note(event, job, round_, reason)
        at = now()
        record = AuditRecord(
            operation=f"federation.{event}",
            run_id="",
            request_hash="",
            request_bytes=0,
            artifact_ids=(),
            started=at,
            completed=at,
            success=not reason,
            error_code=FederationRefusedError.code if reason else "",
            dp_metrics=None,
            actor=caller.key_id,
            facts={"job": job, "round": str(round_), **({"reason": reason} if reason else {})},
        )
        await self.executors.io(self.audit.append(caller.tenant, record).result)

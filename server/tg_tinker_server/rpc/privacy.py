"""PrivacyService: ledgers, reports, forecasts, the audit log."""

from __future__ import annotations

from dataclasses import dataclass

from tg_tinker.proto.v1 import privacy_pb2
from tg_tinker.wire.log import checkpoint_to_proto
from tg_tinker.wire.times import time_from_proto
from tg_tinker_server.ledger.audit import AuditLog
from tg_tinker_server.rpc.endpoint import Call
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.service.log import LogService
from tg_tinker_server.service.privacy import PrivacyService
from tg_tinker_server.service.runs import RunRegistry

MAX_LISTED = 10_000


@dataclass(frozen=True, slots=True)
class PrivacyServicer:
    """ledger, report, forecast, audit."""

    registry: RunRegistry
    privacy: PrivacyService
    audit: AuditLog
    log: LogService
    executors: Executors

    async def GetLedger(  # noqa: N802
        self, call: Call, request: privacy_pb2.GetLedgerRequest
    ) -> privacy_pb2.GetLedgerReply:
        """The whole ledger of a dataset."""
        entries, spent = await self.privacy.entries(call.caller, request.dataset_id)
        return privacy_pb2.GetLedgerReply(
            dataset_id=request.dataset_id,
            entries_json=[e.to_json() for e in entries],
            epsilon_spent=spent.epsilon,
            target_epsilon=float("inf") if spent.target_epsilon is None else spent.target_epsilon,
            delta=spent.delta,
        )

    async def GetPrivacyReport(  # noqa: N802
        self, call: Call, request: privacy_pb2.GetPrivacyReportRequest
    ) -> privacy_pb2.GetPrivacyReportReply:
        """The signed report on a dataset."""
        envelope = await self.privacy.report_for(call.caller, request.dataset_id)
        return privacy_pb2.GetPrivacyReportReply(report_json=envelope.decode())

    async def AttachAudit(  # noqa: N802
        self, call: Call, request: privacy_pb2.AttachAuditRequest
    ) -> privacy_pb2.AttachAuditReply:
        """Note an empirical audit."""
        await self.privacy.attach_audit(call.caller, request.dataset_id, request.result_json)
        return privacy_pb2.AttachAuditReply()

    async def ForecastPrivacy(  # noqa: N802
        self, call: Call, request: privacy_pb2.ForecastPrivacyRequest
    ) -> privacy_pb2.ForecastPrivacyReply:
        """What more steps would cost."""
        run = await self.registry.get(call.caller, request.run_id)
        forecast = await self.privacy.forecast(run, request.steps)
        spent = await self.privacy.spent(run)
        return privacy_pb2.ForecastPrivacyReply(
            epsilon_now=forecast.epsilon_now,
            epsilon_after=forecast.epsilon_after,
            steps_remaining=forecast.steps_remaining,
            delta=forecast.delta,
            ledger_head=spent.head if spent else b"",
        )

    async def GetCheckpoint(  # noqa: N802
        self, call: Call, request: privacy_pb2.GetCheckpointRequest
    ) -> privacy_pb2.GetCheckpointReply:
        """The log as it stands, signed."""
        return checkpoint_to_proto(await self.log.states(call.tenant, request.known_sizes))

    async def GetLogEntries(  # noqa: N802
        self, call: Call, request: privacy_pb2.GetLogEntriesRequest
    ) -> privacy_pb2.GetLogEntriesReply:
        """A stretch of the whole log."""
        call.caller.refuse_policy("read the whole log, which names every dataset of the tenant")
        entries = await self.log.entries(call.tenant, request.start, request.count)
        return privacy_pb2.GetLogEntriesReply(entries_json=entries)

    async def GetAuditLog(  # noqa: N802
        self, call: Call, request: privacy_pb2.GetAuditLogRequest
    ) -> privacy_pb2.GetAuditLogReply:
        """The newest records that fit, oldest of them first."""
        if call.caller.policy is not None:  # of its own runs only
            await self.registry.row(call.caller, request.run_id)
        start = time_from_proto(request.start_time) if request.HasField("start_time") else None
        end = time_from_proto(request.end_time) if request.HasField("end_time") else None
        entries = await self.executors.io(
            self.audit.query,
            call.tenant,
            run_id=request.run_id,
            operation=request.operation,
            start=start,
            end=end,
            limit=min(max(1, request.limit or 100), MAX_LISTED),
        )
        return privacy_pb2.GetAuditLogReply(entries_json=[e.to_json() for e in entries])

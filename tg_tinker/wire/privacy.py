"""Ledgers, forecasts and audit logs on the wire. Chain entries travel as the canonical lines that are hashed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tg_tinker.errors import InvalidRequestError
from tg_tinker.ledger import ChainEntry, PrivacyLedger
from tg_tinker.proto.v1 import privacy_pb2
from tg_tinker.transparency._encoding import from_base64
from tg_tinker.types import AuditLogEntry
from tg_tinker.wire.json_text import json_from_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What more steps would cost.

    Attributes:
        epsilon_now: spent on the dataset so far, at ``delta``.
        epsilon_after: after the steps asked about.
        steps_remaining: that the budget allows; -1 without a finite target.
        ledger_head: hash of the ledger's last entry.
    """

    epsilon_now: float
    epsilon_after: float
    steps_remaining: int
    delta: float
    ledger_head: bytes = b""


def forecast_to_proto(forecast: Forecast) -> privacy_pb2.ForecastPrivacyReply:
    """A forecast as a message."""
    return privacy_pb2.ForecastPrivacyReply(
        epsilon_now=forecast.epsilon_now,
        epsilon_after=forecast.epsilon_after,
        steps_remaining=forecast.steps_remaining,
        delta=forecast.delta,
        ledger_head=forecast.ledger_head,
    )


def forecast_from_proto(reply: privacy_pb2.ForecastPrivacyReply) -> Forecast:
    """A forecast from a message."""
    return Forecast(
        epsilon_now=reply.epsilon_now,
        epsilon_after=reply.epsilon_after,
        steps_remaining=reply.steps_remaining,
        delta=reply.delta,
        ledger_head=reply.ledger_head,
    )


def ledger_to_proto(ledger: PrivacyLedger) -> privacy_pb2.GetLedgerReply:
    """A dataset's ledger as a message."""
    return privacy_pb2.GetLedgerReply(
        dataset_id=ledger.dataset_id,
        entries_json=[e.to_json() for e in ledger.entries],
        epsilon_spent=ledger.epsilon_spent,
        target_epsilon=ledger.target_epsilon,
        delta=ledger.delta,
    )


def ledger_from_proto(reply: privacy_pb2.GetLedgerReply) -> PrivacyLedger:
    """A dataset's ledger from a message; not verified, call ``verify()``."""
    return PrivacyLedger.from_lines(
        reply.dataset_id,
        reply.entries_json,
        epsilon_spent=reply.epsilon_spent,
        target_epsilon=reply.target_epsilon,
        delta=reply.delta,
    )


def report_of(envelope: bytes) -> dict[str, Any]:
    """The report in a DSSE envelope, its signature unchecked.

    Raises:
        InvalidRequestError: it holds none.
    """
    try:
        payload = from_base64(json.loads(envelope)["payload"]).decode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise InvalidRequestError(
            "the server's report is not in an envelope", field="report", constraint="a DSSE envelope"
        ) from e
    return json_from_text(payload, field="report")


def audit_from_lines(lines: Iterable[str]) -> list[AuditLogEntry]:
    """Audit records from their chain lines.

    Raises:
        InvalidRequestError: a line is not an audit record.
    """
    return [_audit_entry(ChainEntry.from_json(line)) for line in lines]


def _audit_entry(entry: ChainEntry) -> AuditLogEntry:
    body = entry.body
    try:
        return AuditLogEntry(
            entry_id=entry.position,
            operation=body["operation"],
            training_client_id=body["training_client_id"],
            request_hash=body["request_hash"],
            request_bytes=body["request_bytes"],
            artifact_ids=list(body["artifact_ids"]),
            started=datetime.fromisoformat(body["started"]),
            completed=datetime.fromisoformat(body["completed"]),
            success=body["success"],
            error_code=body["error_code"],
            dp_metrics=body["dp_metrics"],
            prev_hash=entry.prev_hash.hex(),
            record_hash=entry.entry_hash.hex(),
            actor=body.get("actor", ""),
            facts=dict(body.get("facts", {})),
        )
    except (KeyError, TypeError, ValueError) as e:
        raise InvalidRequestError(
            f"a line of the audit log is not a record: {e}", field="entries", constraint="an audit record"
        ) from e

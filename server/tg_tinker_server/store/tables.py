"""Every table. The tenant is part of every key; ledger and audit rows can only be added."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
)

metadata = MetaData()


class UtcTime(TypeDecorator[datetime]):
    """An aware time, kept in UTC; SQLite alone would drop the zone."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """To the database. A naive time is refused: it means another moment on every machine."""
        if value is not None and value.tzinfo is None:
            raise ValueError("a datetime without a timezone cannot be stored")
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """From the database."""
        return None if value is None else value.replace(tzinfo=UTC)


def _key(name: str, *, length: int = 200) -> Column[str]:
    return Column(name, String(length), primary_key=True)


api_keys = Table(
    "api_keys",
    metadata,
    _key("key_id", length=32),
    Column("tenant", String(200), nullable=False, index=True),
    Column("roles", Text, nullable=False),
    Column("mac", LargeBinary, nullable=False),
    Column("created", UtcTime, nullable=False),
    Column("revoked", UtcTime),
    Column("label", Text, nullable=False),
    Column("policy", Text),
)

tenant_keys = Table(
    "tenant_keys",
    metadata,
    _key("tenant"),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("wrapped", LargeBinary, nullable=False),
    Column("created", UtcTime, nullable=False),
    Column("destroyed", UtcTime),
)

runs = Table(
    "runs",
    metadata,
    _key("tenant"),
    _key("run_id", length=64),
    Column("request_id", String(128), nullable=False),
    Column("config_json", Text, nullable=False),
    Column("status", String(16), nullable=False),
    Column("step", Integer, nullable=False),
    Column("durable_seq", BigInteger, nullable=False),
    Column("state_artifact_id", String(64)),
    Column("created", UtcTime, nullable=False),
    Column("updated", UtcTime, nullable=False),
    Column("dataset_id", String(200)),
    Column("noise_multiplier", Float(53)),
    UniqueConstraint("tenant", "request_id", name="uq_runs_request"),
)

results = Table(
    "results",
    metadata,
    _key("tenant"),
    _key("run_id", length=64),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("operation", String(32), nullable=False),
    Column("request_mac", LargeBinary, nullable=False),
    Column("status", String(16), nullable=False),
    Column("sealed", LargeBinary, nullable=False),
    Column("future_id", String(96), nullable=False),
    Column("created", UtcTime, nullable=False),
)

artifacts = Table(
    "artifacts",
    metadata,
    _key("tenant"),
    _key("artifact_id", length=64),
    Column("run_id", String(64), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("step", Integer, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("content_hash", String(80), nullable=False),
    Column("algorithm", String(40), nullable=False),
    Column("key_id", String(300), nullable=False),
    Column("name", Text, nullable=False),
    Column("created", UtcTime, nullable=False),
    Column("deleted", UtcTime),
    Column("purpose", String(24), nullable=False, server_default="weights"),
    Column("name_mac", LargeBinary),
    Column("expires", UtcTime),
    Column("optimizer", Boolean),
    Column("metadata_json", Text),
    Index(
        "uq_artifacts_name",
        "tenant",
        "run_id",
        "purpose",
        "name_mac",
        unique=True,
        sqlite_where=text("deleted IS NULL AND name_mac IS NOT NULL"),
        postgresql_where=text("deleted IS NULL AND name_mac IS NOT NULL"),
    ),
)

custom_losses = Table(
    "custom_losses",
    metadata,
    _key("tenant"),
    _key("loss_id", length=64),
    Column("graph_json", Text, nullable=False),
    Column("created", UtcTime, nullable=False),
)

samplers = Table(
    "samplers",
    metadata,
    _key("tenant"),
    _key("sampler_id", length=128),
    Column("base_model", Text, nullable=False),
    Column("artifact_id", String(64), nullable=False),
    Column("path", Text, nullable=False),
    Column("created", UtcTime, nullable=False),
)

datasets = Table(
    "datasets",
    metadata,
    _key("tenant"),
    _key("dataset_id"),
    Column("unit", String(32), nullable=False),
    Column("target_epsilon", Float(53)),
    Column("target_delta", Float(53), nullable=False),
    Column("created", UtcTime, nullable=False),
)

# An upload becomes the dataset of its name when it is sealed; a deleted one keeps its row and its name.
dataset_stores = Table(
    "dataset_stores",
    metadata,
    _key("tenant"),
    _key("upload_id", length=64),
    Column("dataset_id", String(200), nullable=False),
    Column("status", String(16), nullable=False),
    Column("unit", String(32), nullable=False),
    Column("target_epsilon", Float(53)),
    Column("target_delta", Float(53), nullable=False),
    Column("truncate", Integer, nullable=False),
    Column("slots", BigInteger, nullable=False),
    Column("expected_records", BigInteger, nullable=False),
    Column("received", BigInteger, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("records", BigInteger, nullable=False),
    Column("units", BigInteger, nullable=False),
    Column("key_id", String(300), nullable=False),
    Column("wrapped_key", LargeBinary),
    Column("created", UtcTime, nullable=False),
    Column("updated", UtcTime, nullable=False),
    Index(
        "uq_dataset_stores_name",
        "tenant",
        "dataset_id",
        unique=True,
        sqlite_where=text("status != 'open'"),
        postgresql_where=text("status != 'open'"),
    ),
)

dataset_records = Table(
    "dataset_records",
    metadata,
    _key("tenant"),
    _key("upload_id", length=64),
    Column("position", BigInteger, primary_key=True, autoincrement=False),
    Column("slot", BigInteger, nullable=False),
    Column("record_id", LargeBinary, nullable=False),
    Column("sealed", LargeBinary, nullable=False),
    UniqueConstraint("tenant", "upload_id", "record_id", name="uq_dataset_records_id"),
    Index("ix_dataset_records_slot", "tenant", "upload_id", "slot"),
)

# Append-only: triggers refuse UPDATE, DELETE, and INSERT anywhere but at the end of a chain.
ledger = Table(
    "ledger",
    metadata,
    _key("tenant"),
    _key("dataset_id"),
    Column("position", BigInteger, primary_key=True, autoincrement=False),
    Column("kind", String(16), nullable=False),
    Column("run_id", String(64), nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("body_json", Text, nullable=False),
    Column("prev_hash", LargeBinary, nullable=False),
    Column("entry_hash", LargeBinary, nullable=False),
    Column("leaf_index", BigInteger, nullable=False),
    UniqueConstraint("tenant", "dataset_id", "run_id", "seq", "attempt", "kind", name="uq_ledger_once"),
    Index("ix_ledger_leaf", "tenant", "leaf_index"),
)

participations = Table(
    "participations",
    metadata,
    _key("tenant"),
    _key("dataset_id"),
    _key("run_id", length=64),
    Column("unit_mac", LargeBinary, primary_key=True),
    Column("count", Integer, nullable=False),
)

# Append-only, like the ledger.
audit = Table(
    "audit",
    metadata,
    _key("tenant"),
    Column("position", BigInteger, primary_key=True, autoincrement=False),
    Column("body_json", Text, nullable=False),
    Column("prev_hash", LargeBinary, nullable=False),
    Column("record_hash", LargeBinary, nullable=False),
    Column("leaf_index", BigInteger, nullable=False),
    Index("ix_audit_leaf", "tenant", "leaf_index"),
)

# Append-only. Every entry of ledger and audit log is a leaf (level 0) of its tenant's tree.
log_nodes = Table(
    "log_nodes",
    metadata,
    _key("tenant"),
    Column("level", Integer, primary_key=True, autoincrement=False),
    Column("idx", BigInteger, primary_key=True, autoincrement=False),
    Column("hash", LargeBinary, nullable=False),
    sqlite_with_rowid=False,
)

# Of the Tinker protocol: what its users call a session, and requests that were acknowledged before they are durable.
gateway_sessions = Table(
    "gateway_sessions",
    metadata,
    _key("tenant"),
    _key("session_id", length=64),
    Column("key_id", String(32), nullable=False),
    Column("sealed", LargeBinary, nullable=False),
    Column("created", UtcTime, nullable=False),
    Column("finished", UtcTime),
)

gateway_requests = Table(
    "gateway_requests",
    metadata,
    _key("tenant"),
    _key("model_id", length=96),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("entry_id", String(128), nullable=False),
    Column("name", String(32), nullable=False),
    Column("actor", String(32), nullable=False),
    Column("sealed", LargeBinary, nullable=False),
    Column("created", UtcTime, nullable=False),
)

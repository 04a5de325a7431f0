"""What the server says about runs, artifacts, itself and its audit log."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """Settings of a ServiceClient, resolved from arguments and environment. The key is never shown."""

    base_url: str
    timeout: float
    retry_count: int
    tls: bool
    api_key: str | None = field(default=None, repr=False)
    tenant_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingClientInfo:
    """One row of ``list_training_clients``."""

    training_client_id: str
    model_ref: str
    status: str
    step: int
    created: datetime
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The same id under a shorter name."""
        return self.training_client_id


@dataclass(frozen=True, kw_only=True)
class ArtifactInfo:
    """One encrypted checkpoint in the store.

    Attributes:
        kind: "weights", "sampler_weights" (without an optimizer) or "external_weights".
        path: ``tg://<run>/<kind>/<name or id>``; an id will do wherever a path will.
        expires: from then on it is missing; ``None``: kept until it is deleted.
        optimizer: whether the optimizer's state is in it.
        metadata: of its writer; empty where that was over 4 KiB.
    """

    artifact_id: str
    training_client_id: str
    step: int
    size_bytes: int
    content_hash: str
    algorithm: str
    key_id: str
    timestamp: datetime
    name: str = ""
    kind: str = "weights"
    path: str = ""
    expires: datetime | None = None
    optimizer: bool = True
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """A base model the server offers."""

    name: str
    family: str
    parameters: int
    max_sequence_length: int


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What the server can do; ``api`` names every method, as ``<service>/<name>``."""

    server_version: str
    api_version: str
    models: list[ModelInfo]
    max_batch_records: int
    max_request_bytes: int
    losses: list[str]
    optimizers: list[str]
    lr_schedulers: list[str]
    reducers: list[str]
    dp_sampling_modes: list[str]
    dp_accountants: list[str]
    tenant_id: str
    api: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class AuditLogEntry:
    """One operation as the audit log keeps it: ids, sizes, keyed hashes; never content.

    ``record_hash`` is the SHA-256 over the canonical entry, ``prev_hash`` that of the entry before: a chain.
    ``actor`` is the id of the key that asked; ``facts`` are public details such as the recipients of an export.
    """

    entry_id: int
    operation: str
    training_client_id: str
    request_hash: str
    request_bytes: int
    artifact_ids: list[str]
    started: datetime
    completed: datetime
    success: bool
    error_code: str
    dp_metrics: dict[str, Any] | None
    prev_hash: str
    record_hash: str
    actor: str = ""
    facts: dict[str, str] = field(default_factory=dict)

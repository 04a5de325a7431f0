"""Descriptions of encrypted checkpoints on the wire."""

from __future__ import annotations

from tg_tinker.proto.v1 import artifacts_pb2
from tg_tinker.types import ArtifactInfo
from tg_tinker.wire.json_text import json_from_text, json_to_text
from tg_tinker.wire.times import time_from_proto, time_to_proto


def artifact_to_proto(info: ArtifactInfo) -> artifacts_pb2.ArtifactInfo:
    """A checkpoint's row as a message."""
    return artifacts_pb2.ArtifactInfo(
        artifact_id=info.artifact_id,
        run_id=info.training_client_id,
        step=info.step,
        size_bytes=info.size_bytes,
        content_hash=info.content_hash,
        encryption_algorithm=info.algorithm,
        encryption_key_id=info.key_id,
        timestamp=time_to_proto(info.timestamp),
        name=info.name,
        kind=info.kind,
        path=info.path,
        expires=None if info.expires is None else time_to_proto(info.expires),
        optimizer=info.optimizer,
        metadata_json=json_to_text(info.metadata, field="metadata"),
    )


def artifact_from_proto(message: artifacts_pb2.ArtifactInfo) -> ArtifactInfo:
    """A checkpoint's row from a message."""
    return ArtifactInfo(
        artifact_id=message.artifact_id,
        training_client_id=message.run_id,
        step=message.step,
        size_bytes=message.size_bytes,
        content_hash=message.content_hash,
        algorithm=message.encryption_algorithm,
        key_id=message.encryption_key_id,
        timestamp=time_from_proto(message.timestamp),
        name=message.name,
        kind=message.kind,
        path=message.path,
        expires=time_from_proto(message.expires) if message.HasField("expires") else None,
        optimizer=message.optimizer,
        metadata=json_from_text(message.metadata_json, field="metadata"),
    )

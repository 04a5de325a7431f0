"""RestClient: runs and checkpoints page by page, in the words of the public API's REST client."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tg_tinker._transport import Transport
from tg_tinker.errors import ResourceNotFoundError
from tg_tinker.exports.files import write_whole
from tg_tinker.types import ArtifactInfo, AuditLogEntry
from tg_tinker.types.rest import Checkpoint, CheckpointsListResponse, Cursor, TrainingRun, TrainingRunsResponse
from tg_tinker.types.run import RunInfo
from tg_tinker.wire import requests
from tg_tinker.wire.artifacts import artifact_from_proto
from tg_tinker.wire.privacy import audit_from_lines
from tg_tinker.wire.runs import run_info_from_proto

_KINDS = {"weights": "training", "sampler_weights": "sampler"}
_EVERY = 1000


class RestClient:
    """Made by ``ServiceClient.create_rest_client``. What it returns may be awaited, or asked for ``result()``.

    A checkpoint is named by its path, its id, or ``weights/<name>`` of its run.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def list_training_runs(self, limit: int = 20, offset: int = 0) -> TrainingRunsResponse:
        """A page of runs, newest first."""
        reply = self._transport.call(requests.list_runs(None, limit, offset))
        return TrainingRunsResponse(
            training_runs=[_run(run_info_from_proto(r)) for r in reply.runs],
            cursor=Cursor(offset=offset, limit=limit, total_count=reply.total),
        )

    def get_training_run(self, training_run_id: str) -> TrainingRun:
        """One run, with its newest checkpoints.

        Raises:
            ResourceNotFoundError: there is none of this tenant.
        """
        run = _run(run_info_from_proto(self._transport.call(requests.get_run(training_run_id, summary=True))))
        for checkpoint in reversed(self.list_checkpoints(training_run_id).checkpoints):
            if checkpoint.checkpoint_type == "sampler":
                run.last_sampler_checkpoint = checkpoint
            else:
                run.last_checkpoint = checkpoint
        return run

    def list_checkpoints(self, training_run_id: str) -> CheckpointsListResponse:
        """Every checkpoint of a run, newest first; the newest thousand."""
        return self._page(training_run_id, _EVERY, 0)

    def list_user_checkpoints(self, limit: int = 100, offset: int = 0) -> CheckpointsListResponse:
        """A page of the tenant's checkpoints, newest first."""
        return self._page(None, limit, offset)

    def delete_checkpoint(self, training_run_id: str, checkpoint_id: str) -> None:
        """Delete a checkpoint; what it cost stays in the ledger.

        Raises:
            ResourceNotFoundError: the run has none of that name.
        """
        self.delete_checkpoint_from_tinker_path(_path(training_run_id, checkpoint_id))

    def delete_checkpoint_from_tinker_path(self, tinker_path: str) -> None:
        """Delete a checkpoint by its path."""
        self._transport.call(requests.delete_artifact(tinker_path))

    def set_checkpoint_ttl_from_tinker_path(self, tinker_path: str, ttl_seconds: int | None) -> Checkpoint:
        """Say how long from now a checkpoint is kept; ``None``: until it is deleted."""
        reply = self._transport.call(requests.set_artifact_ttl(tinker_path, ttl_seconds))
        return _checkpoint(artifact_from_proto(reply))

    def get_weights_info_by_tinker_path(self, tinker_path: str) -> TrainingRun:
        """The run that saved a checkpoint: its base model and its adapter's rank."""
        info = artifact_from_proto(self._transport.call(requests.get_artifact(tinker_path)))
        return self.get_training_run(info.training_client_id)

    def get_checkpoint_archive(self, tinker_path: str, destination: str | Path | None = None) -> bytes:
        """The encrypted bytes of a checkpoint; to open it, ``ServiceClient.download_adapter``.

        Args:
            destination: also write them to this file; it appears whole or not at all.
        """
        data = b"".join(chunk.data for chunk in self._transport.stream(requests.pull_artifact(tinker_path)))
        if destination is not None:
            write_whole(Path(destination), [data])
        return data

    def get_audit_log(
        self,
        training_run_id: str | None = None,
        operation: str | None = None,
        start_time: datetime | None = None,
        end_time: datetime | None = None,
        limit: int = 100,
    ) -> Sequence[AuditLogEntry]:
        """The newest audit records that fit, oldest of them first. Times are timezone-aware."""
        request = requests.audit_log(training_run_id, operation, start_time, end_time, limit)
        return audit_from_lines(self._transport.call(request).entries_json)

    # Twins for coroutines.

    async def list_training_runs_async(self, limit: int = 20, offset: int = 0) -> TrainingRunsResponse:
        """Like ``list_training_runs``."""
        return await asyncio.to_thread(self.list_training_runs, limit, offset)

    async def get_training_run_async(self, training_run_id: str) -> TrainingRun:
        """Like ``get_training_run``."""
        return await asyncio.to_thread(self.get_training_run, training_run_id)

    async def list_checkpoints_async(self, training_run_id: str) -> CheckpointsListResponse:
        """Like ``list_checkpoints``."""
        return await asyncio.to_thread(self.list_checkpoints, training_run_id)

    async def delete_checkpoint_async(self, training_run_id: str, checkpoint_id: str) -> None:
        """Like ``delete_checkpoint``."""
        await asyncio.to_thread(self.delete_checkpoint, training_run_id, checkpoint_id)

    def _page(self, run_id: str | None, limit: int, offset: int) -> CheckpointsListResponse:
        reply = self._transport.call(requests.list_artifacts(run_id, limit, offset))
        return CheckpointsListResponse(
            checkpoints=[_checkpoint(artifact_from_proto(a)) for a in reply.artifacts],
            cursor=Cursor(offset=offset, limit=limit, total_count=reply.total),
        )


def _path(run_id: str, checkpoint_id: str) -> str:
    """A checkpoint of a run as a path; what names another run's checkpoint is no checkpoint of this one."""
    if checkpoint_id.startswith(("tg://", "tinker://")):
        if not checkpoint_id.startswith(f"tg://{run_id}/"):
            raise ResourceNotFoundError(
                f"{run_id} has no checkpoint {checkpoint_id}", resource_type="artifact", resource_id=checkpoint_id
            )
        return checkpoint_id
    kind, slash, _ = checkpoint_id.partition("/")
    if slash and kind in (*_KINDS, "external_weights"):
        return f"tg://{run_id}/{checkpoint_id}"
    return f"tg://{run_id}/weights/{checkpoint_id}"


def _run(info: RunInfo) -> TrainingRun:
    lora = info.config.lora_config
    metadata: dict[str, Any] = dict(info.config.metadata)
    return TrainingRun(
        training_run_id=info.run_id,
        base_model=info.config.model_ref,
        is_lora=lora is not None,
        lora_rank=None if lora is None else lora.rank,
        status=info.status,
        step=info.step,
        created=info.created,
        last_request_time=info.updated or info.created,
        corrupted=info.status == "failed",
        user_metadata=metadata,
    )


def _checkpoint(info: ArtifactInfo) -> Checkpoint:
    return Checkpoint(
        checkpoint_id=info.artifact_id,
        checkpoint_type=_KINDS.get(info.kind, info.kind),
        time=info.timestamp,
        tinker_path=info.path,
        size_bytes=info.size_bytes,
        expires_at=info.expires,
        metadata=dict(info.metadata),
    )

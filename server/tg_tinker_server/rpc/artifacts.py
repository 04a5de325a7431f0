"""ArtifactService: encrypted checkpoints, as ciphertext."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from tg_tinker.proto.v1 import artifacts_pb2
from tg_tinker.types import ArtifactInfo
from tg_tinker.wire.artifacts import artifact_to_proto
from tg_tinker_server.rpc.endpoint import Call
from tg_tinker_server.service.checkpoints import CheckpointService
from tg_tinker_server.service.executors import Executors

MAX_LISTED = 1000


@dataclass(frozen=True, slots=True)
class ArtifactServicer:
    """pull, list, delete."""

    checkpoints: CheckpointService
    executors: Executors

    async def PullArtifact(  # noqa: N802
        self, call: Call, request: artifacts_pb2.PullArtifactRequest
    ) -> AsyncIterator[artifacts_pb2.ArtifactChunk]:
        """Stream the ciphertext."""
        pieces = await self.checkpoints.pull(call.tenant, request.artifact_id)
        while (piece := await self.executors.io(next, pieces, None)) is not None:
            yield artifacts_pb2.ArtifactChunk(data=piece)

    async def ListArtifacts(  # noqa: N802
        self, call: Call, request: artifacts_pb2.ListArtifactsRequest
    ) -> artifacts_pb2.ListArtifactsReply:
        """The tenant's checkpoints, newest first."""
        limit = min(max(1, request.limit or 100), MAX_LISTED)
        rows = await self.checkpoints.list(call.tenant, request.run_id, limit)
        infos = [
            ArtifactInfo(
                artifact_id=r.artifact_id,
                training_client_id=r.run_id,
                step=r.step,
                size_bytes=r.size_bytes,
                content_hash=r.content_hash,
                algorithm=r.algorithm,
                key_id=r.key_id,
                timestamp=r.created,
                name=r.name,
            )
            for r in rows
        ]
        return artifacts_pb2.ListArtifactsReply(artifacts=[artifact_to_proto(i) for i in infos])

    async def DeleteArtifact(  # noqa: N802
        self, call: Call, request: artifacts_pb2.DeleteArtifactRequest
    ) -> artifacts_pb2.DeleteArtifactReply:
        """Delete a checkpoint."""
        await self.checkpoints.delete(call.tenant, request.artifact_id)
        return artifacts_pb2.DeleteArtifactReply()

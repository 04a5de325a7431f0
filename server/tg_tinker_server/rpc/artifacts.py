"""ArtifactService: encrypted checkpoints, as ciphertext; exports of them, out and in."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from tg_tinker.errors import InvalidRequestError
from tg_tinker.proto.v1 import artifacts_pb2
from tg_tinker.types import ArtifactInfo
from tg_tinker.wire.artifacts import artifact_to_proto
from tg_tinker_server.rpc.endpoint import Call
from tg_tinker_server.service.checkpoints import CheckpointService, Described
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.service.exports import ExportService, Sealing
from tg_tinker_server.service.imports import ImportService
from tg_tinker_server.store.artifact_rows import ArtifactRow

MAX_LISTED = 1000


@dataclass(frozen=True, slots=True)
class ArtifactServicer:
    """pull, list, get, delete, set a lifetime, export, import."""

    checkpoints: CheckpointService
    exports: ExportService
    imports: ImportService
    executors: Executors

    async def PullArtifact(  # noqa: N802
        self, call: Call, request: artifacts_pb2.PullArtifactRequest
    ) -> AsyncIterator[artifacts_pb2.ArtifactChunk]:
        """Stream the ciphertext."""
        pieces = await self.checkpoints.pull(call.caller, request.artifact_id)
        while (piece := await self.executors.io(next, pieces, None)) is not None:
            yield artifacts_pb2.ArtifactChunk(data=piece)

    async def ListArtifacts(  # noqa: N802
        self, call: Call, request: artifacts_pb2.ListArtifactsRequest
    ) -> artifacts_pb2.ListArtifactsReply:
        """The caller's checkpoints, newest first."""
        limit = min(max(1, request.limit or 100), MAX_LISTED)
        found, total = await self.checkpoints.list(
            call.caller, run_id=request.run_id, purpose=request.kind, limit=limit, offset=request.offset
        )
        return artifacts_pb2.ListArtifactsReply(artifacts=[artifact_to_proto(info_of(d)) for d in found], total=total)

    async def GetArtifact(  # noqa: N802
        self, call: Call, request: artifacts_pb2.GetArtifactRequest
    ) -> artifacts_pb2.ArtifactInfo:
        """Describe a checkpoint."""
        return await self._described(await self.checkpoints.row(call.caller, request.artifact_id))

    async def SetArtifactTTL(  # noqa: N802
        self, call: Call, request: artifacts_pb2.SetArtifactTTLRequest
    ) -> artifacts_pb2.ArtifactInfo:
        """Let a checkpoint expire, or keep it."""
        row = await self.checkpoints.row(call.caller, request.artifact_id)
        ttl = request.ttl_seconds if request.HasField("ttl_seconds") else None
        return await self._described(await self.checkpoints.set_ttl(call.caller, row, ttl))

    async def _described(self, row: ArtifactRow) -> artifacts_pb2.ArtifactInfo:
        return artifact_to_proto(info_of(await self.checkpoints.describe(row)))

    async def DeleteArtifact(  # noqa: N802
        self, call: Call, request: artifacts_pb2.DeleteArtifactRequest
    ) -> artifacts_pb2.DeleteArtifactReply:
        """Delete a checkpoint."""
        await self.checkpoints.delete(call.caller, request.artifact_id)
        return artifacts_pb2.DeleteArtifactReply()

    async def ExportArtifact(  # noqa: N802
        self, call: Call, request: artifacts_pb2.ExportArtifactRequest
    ) -> AsyncIterator[artifacts_pb2.ArtifactChunk]:
        """Stream an export, sealed for its receivers."""
        sealing = Sealing(recipients=tuple(request.recipients), pq_recipients=tuple(request.pq_recipients))
        pieces = await self.exports.export(call.caller, request.artifact_id, sealing)
        while (piece := await self.executors.io(next, pieces, None)) is not None:
            yield artifacts_pb2.ArtifactChunk(data=piece)

    async def ImportArtifact(  # noqa: N802
        self, call: Call, requests: AsyncIterator[artifacts_pb2.ImportArtifactRequest]
    ) -> artifacts_pb2.ImportArtifactReply:
        """Take in the archive of an export."""
        first = await anext(requests, None)
        if first is None or first.WhichOneof("part") != "signer":
            raise InvalidRequestError(
                "an import begins with the verifier key of the signer that you trust",
                field="signer",
                constraint="first",
            )

        async def data() -> AsyncIterator[bytes]:
            async for request in requests:
                if request.WhichOneof("part") != "data":
                    raise InvalidRequestError("only data follows the signer", field="data", constraint="bytes")
                yield request.data

        row, manifest = await self.imports.take(call.caller, first.signer, data())
        return artifacts_pb2.ImportArtifactReply(
            artifact=await self._described(row), manifest_json=manifest.payload().decode()
        )


def info_of(described: Described) -> ArtifactInfo:
    """A checkpoint, as callers see it."""
    row = described.row
    return ArtifactInfo(
        artifact_id=row.artifact_id,
        training_client_id=row.run_id,
        step=row.step,
        size_bytes=row.size_bytes,
        content_hash=row.content_hash,
        algorithm=row.algorithm,
        key_id=row.key_id,
        timestamp=row.created,
        name=described.name,
        kind=row.purpose,
        path=described.path,
        expires=row.expires,
        optimizer=row.optimizer is not False,
        metadata=dict(described.metadata),
    )

"""FederationService: what a party of a federation needs of its own server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from tg_tinker.errors import InvalidRequestError
from tg_tinker.proto.v1 import federation_pb2
from tg_tinker.wire.artifacts import artifact_to_proto
from tg_tinker.wire.federation import new_weights_from_proto, weights_to_proto
from tg_tinker_server.rpc.artifacts import info_of
from tg_tinker_server.rpc.endpoint import Call
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.service.federation_notes import FederationNotes
from tg_tinker_server.service.weights import WeightsService


@dataclass(frozen=True, slots=True)
class FederationServicer:
    """pull_weights, import_weights, note_federation."""

    weights: WeightsService
    notes: FederationNotes
    executors: Executors

    async def PullWeights(  # noqa: N802
        self, call: Call, request: federation_pb2.PullWeightsRequest
    ) -> AsyncIterator[federation_pb2.WeightsChunk]:
        """Stream a run's weights."""
        async with self.weights.pull(call.caller, request.run_id) as weights:
            chunks = weights_to_proto(weights)
            while (chunk := await self.executors.io(next, chunks, None)) is not None:
                yield chunk

    async def ImportWeights(  # noqa: N802
        self, call: Call, requests: AsyncIterator[federation_pb2.ImportWeightsRequest]
    ) -> federation_pb2.ImportWeightsReply:
        """Make a checkpoint of plain weights."""
        first = await anext(requests, None)
        if first is None or first.WhichOneof("part") != "head":
            raise InvalidRequestError(
                "an import of weights begins with what they are and where they come from",
                field="head",
                constraint="first",
            )

        async def data() -> AsyncIterator[bytes]:
            async for request in requests:
                if request.WhichOneof("part") != "data":
                    raise InvalidRequestError("only data follows the head", field="data", constraint="bytes")
                yield request.data

        row = await self.weights.take(call.caller, new_weights_from_proto(first.head), data())
        described = await self.weights.checkpoints.describe(row)
        return federation_pb2.ImportWeightsReply(artifact=artifact_to_proto(info_of(described)))

    async def NoteFederation(  # noqa: N802
        self, call: Call, request: federation_pb2.NoteFederationRequest
    ) -> federation_pb2.NoteFederationReply:
        """Note what became of a job or a round."""
        await self.notes.note(
            call.caller, request.event, job=request.job, round_=request.round, reason=request.reason
        )
        return federation_pb2.NoteFederationReply()

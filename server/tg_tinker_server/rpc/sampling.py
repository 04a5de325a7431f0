"""SamplingService: text from a run's released weights."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from tg_tinker.proto.v1 import sampling_pb2, training_pb2
from tg_tinker.wire.calls import Generate, sampling_from_proto
from tg_tinker.wire.results import chunk_to_proto
from tg_tinker_server.rpc.endpoint import Call
from tg_tinker_server.rpc.submitting import Submitting
from tg_tinker_server.service.sampling import SamplingService, check


@dataclass(frozen=True, slots=True)
class SamplingServicer:
    """sample, sample_stream, encode, decode."""

    submitting: Submitting
    sampling: SamplingService

    async def Sample(  # noqa: N802
        self, call: Call, request: sampling_pb2.SampleRequest
    ) -> training_pb2.Submitted:
        """Complete prompts, in order with the run's other operations."""
        return await self.submitting.submit(call, request, "sample", self.sampling.sample, effect=False)

    async def SampleStream(  # noqa: N802
        self, call: Call, request: sampling_pb2.SampleStreamRequest
    ) -> AsyncIterator[sampling_pb2.SampleChunk]:
        """Stream one completion."""
        run = await self.submitting.registry.get(call.tenant, request.run_id)
        params, completions = sampling_from_proto(request.params)
        value = Generate(prompts=(request.prompt,), params=params, num_completions=completions)
        check(value)
        async for chunk in self.sampling.stream(run, value):
            yield chunk_to_proto(chunk)

    async def Encode(  # noqa: N802
        self, call: Call, request: sampling_pb2.EncodeRequest
    ) -> sampling_pb2.EncodeReply:
        """Texts to token ids."""
        run = await self.submitting.registry.get(call.tenant, request.run_id)
        rows = await self.sampling.encode(run, list(request.texts))
        return sampling_pb2.EncodeReply(ids=[sampling_pb2.TokenIds(ids=row) for row in rows])

    async def Decode(  # noqa: N802
        self, call: Call, request: sampling_pb2.DecodeRequest
    ) -> sampling_pb2.DecodeReply:
        """Token ids to texts."""
        run = await self.submitting.registry.get(call.tenant, request.run_id)
        texts = await self.sampling.decode(run, [list(row.ids) for row in request.ids])
        return sampling_pb2.DecodeReply(texts=texts)

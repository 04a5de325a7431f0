"""SamplingService: text from a run's released weights, tokens from those that were saved."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass

from tg_tinker.proto.v1 import sampling_pb2, training_pb2
from tg_tinker.wire.call_messages import sampling_from_proto
from tg_tinker.wire.calls import Generate
from tg_tinker.wire.results import chunk_to_proto
from tg_tinker.wire.tokens import events_to_proto, query_from_proto, sampler_to_proto
from tg_tinker_server.rpc.endpoint import Call
from tg_tinker_server.rpc.submitting import Submitting
from tg_tinker_server.service.samplers import SamplerService
from tg_tinker_server.service.sampling import SamplingService, check


@dataclass(frozen=True, slots=True)
class SamplingServicer:
    """sample, sample_stream, encode, decode; samplers."""

    submitting: Submitting
    sampling: SamplingService
    samplers: SamplerService

    async def Sample(  # noqa: N802
        self, call: Call, request: sampling_pb2.SampleRequest
    ) -> training_pb2.Submitted:
        """Complete prompts, in order with the run's other operations."""
        return await self.submitting.submit(call, request, "sample", effect=False)

    async def SampleStream(  # noqa: N802
        self, call: Call, request: sampling_pb2.SampleStreamRequest
    ) -> AsyncIterator[sampling_pb2.SampleChunk]:
        """Stream one completion."""
        run = await self.submitting.registry.get(call.caller, request.run_id)
        params, completions = sampling_from_proto(request.params)
        value = Generate(prompts=(request.prompt,), params=params, num_completions=completions)
        check(value)
        async with aclosing(self.sampling.stream(run, value)) as chunks:
            async for chunk in chunks:
                yield chunk_to_proto(chunk)

    async def Encode(  # noqa: N802
        self, call: Call, request: sampling_pb2.EncodeRequest
    ) -> sampling_pb2.EncodeReply:
        """Texts to token ids."""
        if request.sampler_id:
            rows = await self.samplers.encode(call.caller, request.sampler_id, list(request.texts))
        else:
            run = await self.submitting.registry.get(call.caller, request.run_id)
            rows = await self.sampling.encode(run, list(request.texts))
        return sampling_pb2.EncodeReply(ids=[sampling_pb2.TokenIds(ids=row) for row in rows])

    async def Decode(  # noqa: N802
        self, call: Call, request: sampling_pb2.DecodeRequest
    ) -> sampling_pb2.DecodeReply:
        """Token ids to texts."""
        ids = [list(row.ids) for row in request.ids]
        if request.sampler_id:
            texts = await self.samplers.decode(call.caller, request.sampler_id, ids)
        else:
            run = await self.submitting.registry.get(call.caller, request.run_id)
            texts = await self.sampling.decode(run, ids)
        return sampling_pb2.DecodeReply(texts=texts)

    async def CreateSampler(  # noqa: N802
        self, call: Call, request: sampling_pb2.CreateSamplerRequest
    ) -> sampling_pb2.Sampler:
        """Name frozen weights."""
        info = await self.samplers.create(
            call.caller, sampler_id=request.sampler_id, base_model=request.base_model, path=request.path
        )
        return sampler_to_proto(info)

    async def GetSampler(  # noqa: N802
        self, call: Call, request: sampling_pb2.GetSamplerRequest
    ) -> sampling_pb2.Sampler:
        """What a sampler names."""
        return sampler_to_proto(await self.samplers.get(call.caller, request.sampler_id))

    async def DeleteSampler(  # noqa: N802
        self, call: Call, request: sampling_pb2.DeleteSamplerRequest
    ) -> sampling_pb2.DeleteSamplerReply:
        """Forget a sampler."""
        await self.samplers.delete(call.caller, request.sampler_id)
        return sampling_pb2.DeleteSamplerReply()

    async def SampleTokens(  # noqa: N802
        self, call: Call, request: sampling_pb2.SampleTokensRequest
    ) -> AsyncIterator[sampling_pb2.SampleTokensReply]:
        """Sample; one reply for each slice that has news."""
        slices = self.samplers.slices(call.caller, request.sampler_id, query_from_proto(request))
        async with aclosing(slices) as news:
            async for events in news:
                yield events_to_proto(events)

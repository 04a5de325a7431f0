"""RunService: the life of training clients, and what the server can do."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from importlib.metadata import version

from tg_tinker.metrics import REDUCERS
from tg_tinker.proto.v1 import runs_pb2, training_pb2
from tg_tinker.types import Capabilities
from tg_tinker.types.configs import LR_SCHEDULERS, OPTIMIZERS
from tg_tinker.types.losses import CUSTOM, LOSSES
from tg_tinker.wire.json_text import json_from_text
from tg_tinker.wire.methods import methods
from tg_tinker.wire.runs import API_VERSION, capabilities_to_proto, config_from_json, run_info_to_proto
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.rpc.endpoint import Call
from tg_tinker_server.rpc.submitting import Submitting
from tg_tinker_server.service.run_info import RunInfos

MAX_LISTED = 1000


@dataclass(frozen=True, slots=True)
class RunServicer:
    """create, get, list, unload, delete, resume, tokenizer, capabilities."""

    submitting: Submitting
    infos: RunInfos
    config: ServerConfig

    async def CreateTrainingClient(  # noqa: N802
        self, call: Call, request: runs_pb2.CreateTrainingClientRequest
    ) -> runs_pb2.RunInfo:
        """Make a run."""
        self.submitting.operations.refuse_when_stopping()
        registry, request_id = self.submitting.registry, request.request_id or call.request_id
        optimizer = request.optimizer if request.HasField("optimizer") else None
        if request.like:
            run = await registry.create_from(
                call.caller,
                request_id,
                request.like,
                optimizer=optimizer,
                base_model=request.base_model,
                metadata=json_from_text(request.metadata_json, field="metadata") if request.metadata_json else None,
            )
        else:
            config = config_from_json(request.config_json)
            run = await registry.create(call.caller, request_id, config, request.checkpoint_id, optimizer)
        return run_info_to_proto(await self.infos.of_run(run))

    async def GetTrainingClient(  # noqa: N802
        self, call: Call, request: runs_pb2.GetTrainingClientRequest
    ) -> runs_pb2.RunInfo:
        """Describe a run, with what a new handle on it needs."""
        if request.summary:
            row = await self.submitting.registry.row(call.caller, request.run_id)
            return run_info_to_proto(await self.infos.of_row(row))
        return run_info_to_proto(await self.infos.get(call.caller, request.run_id))

    async def ListTrainingClients(  # noqa: N802
        self, call: Call, request: runs_pb2.ListTrainingClientsRequest
    ) -> runs_pb2.ListTrainingClientsReply:
        """The caller's runs, newest first."""
        limit = min(max(1, request.limit or 100), MAX_LISTED)
        rows, total = await self.submitting.registry.list(
            call.caller, status=request.status, limit=limit, offset=request.offset
        )
        infos = [await self.infos.of_row(row) for row in rows]
        return runs_pb2.ListTrainingClientsReply(runs=[run_info_to_proto(i) for i in infos], total=total)

    async def DeleteTrainingClient(  # noqa: N802
        self, call: Call, request: runs_pb2.DeleteTrainingClientRequest
    ) -> runs_pb2.DeleteTrainingClientReply:
        """Forget a run; what it spent stays spent."""
        await self.submitting.registry.delete(call.caller, request.run_id)
        return runs_pb2.DeleteTrainingClientReply()

    async def UnloadModel(  # noqa: N802
        self, call: Call, request: runs_pb2.UnloadModelRequest
    ) -> runs_pb2.RunInfo:
        """Free a run's memory and complete it."""
        row = await self.submitting.registry.unload(call.caller, request.run_id)
        return run_info_to_proto(await self.infos.of_row(row))

    async def ResumeTrainingClient(  # noqa: N802
        self, call: Call, request: runs_pb2.ResumeTrainingClientRequest
    ) -> training_pb2.Submitted:
        """Go on after a restart."""
        run = await self.submitting.registry.get(call.caller, request.run_id)
        await self.submitting.operations.resume(run, list(request.finished_seqs))
        return self.submitting.answer(run)

    async def GetTokenizer(  # noqa: N802
        self,
        call: Call,  # noqa: ARG002 - base models are everybody's
        request: runs_pb2.GetTokenizerRequest,
    ) -> AsyncIterator[runs_pb2.TokenizerFile]:
        """Stream the files of a base model's tokenizer."""
        pieces = self.infos.tokenizers.files(request.base_model)
        while (piece := await self.submitting.operations.executors.io(next, pieces, None)) is not None:
            yield runs_pb2.TokenizerFile(name=piece[0], data=piece[1])

    async def GetCapabilities(  # noqa: N802
        self,
        call: Call,
        request: runs_pb2.GetCapabilitiesRequest,  # noqa: ARG002
    ) -> runs_pb2.Capabilities:
        """What this server offers."""
        return capabilities_to_proto(
            Capabilities(
                server_version=version("tg-tinker"),
                api_version=API_VERSION,
                models=await self.submitting.registry.models(),
                max_batch_records=self.config.max_batch_records,
                max_request_bytes=self.config.max_request_bytes,
                losses=[*LOSSES, CUSTOM],
                optimizers=list(OPTIMIZERS),
                lr_schedulers=list(LR_SCHEDULERS),
                reducers=list(REDUCERS),
                dp_sampling_modes=["none", "poisson", "max_participation"],
                dp_accountants=["rdp", "prv"],
                tenant_id=call.tenant,
                api=[f"{m.service}/{m.name}" for m in methods()],
            )
        )

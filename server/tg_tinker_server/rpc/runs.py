"""RunService: the life of training clients, and what the server can do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import version

from tg_tinker.proto.v1 import runs_pb2, training_pb2
from tg_tinker.types import Capabilities, TrainingConfig
from tg_tinker.types.configs import LR_SCHEDULERS, OPTIMIZERS
from tg_tinker.types.run import PrivacyState, RunInfo
from tg_tinker.wire.runs import API_VERSION, capabilities_to_proto, run_info_to_proto
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.ledger.reservation import DatasetScope
from tg_tinker_server.rpc.endpoint import Call
from tg_tinker_server.rpc.submitting import Submitting
from tg_tinker_server.service.privacy import PrivacyService
from tg_tinker_server.service.run import ACTIVE, Run
from tg_tinker_server.store.run_rows import RunRow

MAX_LISTED = 1000


@dataclass(frozen=True, slots=True)
class RunServicer:
    """create, get, list, unload, delete, resume, capabilities."""

    submitting: Submitting
    privacy: PrivacyService
    config: ServerConfig

    async def CreateTrainingClient(  # noqa: N802
        self, call: Call, request: runs_pb2.CreateTrainingClientRequest
    ) -> runs_pb2.RunInfo:
        """Make a run."""
        self.submitting.operations.refuse_when_stopping()
        run = await self.submitting.registry.create(
            call.tenant, request.request_id or call.request_id, request.config_json, request.checkpoint_id
        )
        return run_info_to_proto(await self._info(run))

    async def GetTrainingClient(  # noqa: N802
        self, call: Call, request: runs_pb2.GetTrainingClientRequest
    ) -> runs_pb2.RunInfo:
        """Describe a run, with what a new handle on it needs."""
        registry = self.submitting.registry
        if not registry.in_memory(call.tenant, request.run_id):
            row = await registry.row(call.tenant, request.run_id)
            if row.status != ACTIVE:  # to look at what has ended takes no memory
                return run_info_to_proto(await self._ended(row))
        run = await registry.get(call.tenant, request.run_id)
        info = await self._info(run)
        if "TRAIN" not in call.caller.scopes:
            info = replace(info, unit_key=b"")  # who can key unit ids can recognise people
        return run_info_to_proto(info)

    async def ListTrainingClients(  # noqa: N802
        self, call: Call, request: runs_pb2.ListTrainingClientsRequest
    ) -> runs_pb2.ListTrainingClientsReply:
        """The tenant's runs, newest first."""
        limit = min(max(1, request.limit or 100), MAX_LISTED)
        rows = await self.submitting.registry.list(call.tenant, request.status, limit)
        infos = await self.submitting.registry.executors.io(lambda: [self._summary(r) for r in rows])
        return runs_pb2.ListTrainingClientsReply(runs=[run_info_to_proto(i) for i in infos])

    async def DeleteTrainingClient(  # noqa: N802
        self, call: Call, request: runs_pb2.DeleteTrainingClientRequest
    ) -> runs_pb2.DeleteTrainingClientReply:
        """Forget a run; what it spent stays spent."""
        await self.submitting.registry.delete(call.tenant, request.run_id)
        return runs_pb2.DeleteTrainingClientReply()

    async def UnloadModel(  # noqa: N802
        self, call: Call, request: runs_pb2.UnloadModelRequest
    ) -> runs_pb2.RunInfo:
        """Free a run's memory and complete it."""
        row = await self.submitting.registry.unload(call.tenant, request.run_id)
        return run_info_to_proto(await self.submitting.registry.executors.io(self._summary, row))

    async def ResumeTrainingClient(  # noqa: N802
        self, call: Call, request: runs_pb2.ResumeTrainingClientRequest
    ) -> training_pb2.Submitted:
        """Go on after a restart."""
        run = await self.submitting.registry.get(call.tenant, request.run_id)
        await self.submitting.operations.resume(run, list(request.finished_seqs))
        return self.submitting.answer(run)

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
                losses=["cross_entropy"],
                optimizers=list(OPTIMIZERS),
                lr_schedulers=list(LR_SCHEDULERS),
                reducers=["sum", "mean"],
                dp_sampling_modes=["none", "poisson", "max_participation"],
                dp_accountants=["rdp", "prv"],
                tenant_id=call.tenant,
            )
        )

    async def _info(self, run: Run) -> RunInfo:
        private = run.private
        privacy = None
        if private is not None:
            privacy = await self._privacy_state(private.scope, private.noise_multiplier, run.config)
        return RunInfo(
            run_id=run.run_id,
            config=run.config,
            status=run.status,
            step=run.step,
            created=run.created,
            next_seq=run.lane.highest + 1,
            server_epoch=self.submitting.operations.epoch,
            privacy=privacy,
            trainable_parameters=run.session.trainable_parameters,
            base_dtype=run.session.base_dtype,
            unit_key=run.mac("unit-ids", b""),
        )

    async def _ended(self, row: RunRow) -> RunInfo:
        """A run that has ended and is not in memory, with all that a handle needs to look at it further."""
        registry = self.submitting.registry
        info = await registry.executors.io(self._summary, row)
        highest = await registry.highest_seq(row)
        privacy = None
        if row.dataset_id is not None and row.noise_multiplier is not None:
            scope = DatasetScope(tenant=row.tenant, dataset_id=row.dataset_id)
            privacy = await self._privacy_state(scope, row.noise_multiplier, info.config)
        return replace(info, next_seq=highest + 1, privacy=privacy)

    async def _privacy_state(
        self, scope: DatasetScope, noise_multiplier: float, config: TrainingConfig
    ) -> PrivacyState:
        spent = await self.privacy.spent_in(scope)
        return PrivacyState(
            dataset_id=scope.dataset_id,
            epsilon_spent=spent.epsilon,
            target_epsilon=float("inf") if spent.target_epsilon is None else spent.target_epsilon,
            delta=spent.delta,
            noise_multiplier=noise_multiplier,
            sample_rate=config.sample_rate,
            expected_batch_size=config.expected_batch_size,
            ledger_head=spent.head,
        )

    def _summary(self, row: RunRow) -> RunInfo:
        return RunInfo(
            run_id=row.run_id,
            config=self.submitting.registry.config_of(row),
            status=row.status,
            step=row.step,
            created=row.created,
            next_seq=0,
            server_epoch=self.submitting.operations.epoch,
            privacy=None,
            trainable_parameters=0,
            base_dtype="",
            unit_key=b"",
        )

"""TrainingService: the ordered operations that move weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tg_tinker.proto.v1 import training_pb2
from tg_tinker.wire.calls import Load, Save
from tg_tinker_server.rpc.endpoint import Call
from tg_tinker_server.rpc.submitting import Submitting
from tg_tinker_server.service.checkpoints import CheckpointService
from tg_tinker_server.service.lanes import Operation
from tg_tinker_server.service.run import Run
from tg_tinker_server.service.training import TrainingService
from tg_tinker_server.service.updates import UpdatesService


@dataclass(frozen=True, slots=True)
class TrainingServicer:
    """forward_backward, add_updates, optim_step, save_state, load_state."""

    submitting: Submitting
    training: TrainingService
    updates: UpdatesService
    checkpoints: CheckpointService

    async def ForwardBackward(  # noqa: N802
        self, call: Call, request: training_pb2.ForwardBackwardRequest
    ) -> training_pb2.Submitted:
        """Add a batch to the logical batch, or evaluate it."""
        effect = request.mode != training_pb2.PASS_MODE_EVAL
        return await self.submitting.submit(
            call,
            request,
            "forward_backward",
            self.training.forward_backward,
            effect=effect,
            on_failure=self.training.poison if effect else None,
        )

    async def AddUpdates(  # noqa: N802
        self, call: Call, request: training_pb2.AddUpdatesRequest
    ) -> training_pb2.Submitted:
        """Add rows computed elsewhere to the logical batch."""
        return await self.submitting.submit(
            call,
            request,
            "add_updates",
            self.updates.add_updates,
            effect=True,
            on_failure=self.training.poison,
        )

    async def OptimStep(  # noqa: N802
        self, call: Call, request: training_pb2.OptimStepRequest
    ) -> training_pb2.Submitted:
        """Charge, release, settle."""

        return await self.submitting.submit(call, request, "optim_step", self.training.optim_step, effect=True)

    async def SaveState(  # noqa: N802
        self, call: Call, request: training_pb2.SaveStateRequest
    ) -> training_pb2.Submitted:
        """Write an encrypted checkpoint."""

        async def save(run: Run, operation: Operation, value: Save) -> Any:
            return await self.checkpoints.save(
                run,
                operation,
                include_optimizer=value.include_optimizer,
                metadata=value.metadata,
                name=value.name,
            )

        return await self.submitting.submit(call, request, "save_state", save, effect=False)

    async def LoadState(  # noqa: N802
        self, call: Call, request: training_pb2.LoadStateRequest
    ) -> training_pb2.Submitted:
        """Verify, decrypt and load a checkpoint."""

        async def load(run: Run, operation: Operation, value: Load) -> Any:
            return await self.checkpoints.load(
                run, operation, artifact_id=value.artifact_id, optimizer=value.optimizer
            )

        return await self.submitting.submit(call, request, "load_state", load, effect=True)

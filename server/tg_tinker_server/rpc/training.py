"""TrainingService: the ordered operations that move weights."""

from __future__ import annotations

from dataclasses import dataclass

from tg_tinker.proto.v1 import training_pb2
from tg_tinker_server.rpc.endpoint import Call
from tg_tinker_server.rpc.submitting import Submitting
from tg_tinker_server.service.custom_losses import CustomLosses


@dataclass(frozen=True, slots=True)
class TrainingServicer:
    """forward_backward, add_updates, optim_step, save_state, load_state, create_custom_loss."""

    submitting: Submitting
    losses: CustomLosses

    async def ForwardBackward(  # noqa: N802
        self, call: Call, request: training_pb2.ForwardBackwardRequest
    ) -> training_pb2.Submitted:
        """Add a batch to the logical batch, or evaluate it."""
        effect = request.mode != training_pb2.PASS_MODE_EVAL
        return await self.submitting.submit(call, request, "forward_backward", effect=effect)

    async def AddUpdates(  # noqa: N802
        self, call: Call, request: training_pb2.AddUpdatesRequest
    ) -> training_pb2.Submitted:
        """Add rows computed elsewhere to the logical batch."""
        return await self.submitting.submit(call, request, "add_updates", effect=True)

    async def OptimStep(  # noqa: N802
        self, call: Call, request: training_pb2.OptimStepRequest
    ) -> training_pb2.Submitted:
        """Charge, release, settle."""
        return await self.submitting.submit(call, request, "optim_step", effect=True)

    async def SaveState(  # noqa: N802
        self, call: Call, request: training_pb2.SaveStateRequest
    ) -> training_pb2.Submitted:
        """Write an encrypted checkpoint."""
        return await self.submitting.submit(call, request, "save_state", effect=False)

    async def LoadState(  # noqa: N802
        self, call: Call, request: training_pb2.LoadStateRequest
    ) -> training_pb2.Submitted:
        """Verify, decrypt and load a checkpoint."""
        return await self.submitting.submit(call, request, "load_state", effect=True)

    async def CreateCustomLoss(  # noqa: N802
        self, call: Call, request: training_pb2.CreateCustomLossRequest
    ) -> training_pb2.CreateCustomLossReply:
        """Keep a loss of the caller's own."""
        return training_pb2.CreateCustomLossReply(loss_id=await self.losses.create(call.tenant, request.graph_json))

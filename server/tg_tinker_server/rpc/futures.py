"""FutureService: what became of an operation, by long poll."""

from __future__ import annotations

from dataclasses import dataclass

from tg_tinker.errors import ResourceNotFoundError
from tg_tinker.proto.v1 import runs_pb2
from tg_tinker.wire.calls import Position
from tg_tinker.wire.operations import UNKNOWN, FutureState, asked_for, future_to_proto
from tg_tinker_server.rpc.endpoint import Call
from tg_tinker_server.service.lanes import Operation, future_id, parse_future_id
from tg_tinker_server.service.operations import OperationService
from tg_tinker_server.service.run import Run


@dataclass(frozen=True, slots=True)
class FutureServicer:
    """get, cancel."""

    operations: OperationService

    async def GetFuture(  # noqa: N802
        self, call: Call, request: runs_pb2.GetFutureRequest
    ) -> runs_pb2.FutureReply:
        """Wait up to ``wait_s`` for the operation's end, then say where it stands.

        Results are for those who may run such operations: losses and texts are not an auditor's to read.
        """
        run, seq, operation = await self._find(call, request.key)
        if operation is not None:
            call.caller.require("SAMPLE" if operation.name == "sample" else "TRAIN")
            await self.operations.wait(operation, request.wait_s)
        return future_to_proto(
            FutureState(
                future_id=future_id(run.run_id, seq),
                position=Position(run_id=run.run_id, seq=seq),
                status=operation.status if operation else UNKNOWN,
                operation=operation.name if operation else "",
                server_epoch=self.operations.epoch,
                expected_seq=run.lane.expected,
                durable_seq=run.durable_seq,
                result=operation.result if operation else None,
                error=operation.error if operation else None,
            )
        )

    async def CancelFuture(  # noqa: N802
        self, call: Call, request: runs_pb2.CancelFutureRequest
    ) -> runs_pb2.CancelFutureReply:
        """Cancel if that leaves no effect."""
        run, seq, _ = await self._find(call, request.key)
        return runs_pb2.CancelFutureReply(cancelled=run.lane.cancel(seq))

    async def _find(self, call: Call, key: runs_pb2.OneofKey) -> tuple[Run, int, Operation | None]:
        asked = asked_for(key)
        position = (asked.run_id, asked.seq) if isinstance(asked, Position) else parse_future_id(asked)
        if position is None:
            raise ResourceNotFoundError(
                "no such future for this tenant", resource_type="future", resource_id=str(asked)
            )
        run, operation = await self.operations.find(call.caller, *position)
        return run, position[1], operation

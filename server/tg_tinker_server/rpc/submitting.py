"""What the servicers of ordered calls share: from a request to its place in the run's lane."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from tg_tinker.errors import FutureCancelledError, InvalidRequestError
from tg_tinker.proto.v1 import training_pb2
from tg_tinker.wire.calls import call_from_proto
from tg_tinker.wire.operations import Submission, submission_to_proto
from tg_tinker_server.rpc.endpoint import Call
from tg_tinker_server.service.lanes import Operation
from tg_tinker_server.service.operations import LARGE_PAYLOAD, OperationService
from tg_tinker_server.service.run import Run
from tg_tinker_server.service.runs import RunRegistry

MAX_UNIT_IDS = 1 << 16


@dataclass(frozen=True, slots=True)
class Submitting:
    """Puts calls into lanes. The request is read inside the lane, so that a bad one still takes its turn."""

    registry: RunRegistry
    operations: OperationService

    async def submit(
        self,
        call: Call,
        request: Any,
        name: str,
        work: Callable[[Run, Operation, Any], Awaitable[Any]],
        *,
        effect: bool,
        on_failure: Callable[[Run, Exception], None] | None = None,
    ) -> training_pb2.Submitted:
        """Queue ``work`` at the request's position; answer at once.

        ``on_failure`` is told of every failure but a cancellation, also of a request that cannot be read.
        """
        run = await self.registry.get(call.tenant, request.key.run_id)

        async def turn(operation: Operation) -> Any:
            try:
                return await work(run, operation, await self._read(request))
            except FutureCancelledError:
                raise  # left no effect
            except Exception as e:
                if on_failure is not None:
                    on_failure(run, e)
                raise

        operation = await self.operations.submit(
            run, request.key.seq, name, call.payload, turn, effect=effect, actor=call.caller.key_id
        )
        return self.answer(run, operation.future_id)

    async def _read(self, request: Any) -> Any:
        units = getattr(request, "privacy_unit_ids", ())
        if len(units) > MAX_UNIT_IDS:
            raise InvalidRequestError(
                f"{len(units)} privacy_unit_ids", field="privacy_unit_ids", constraint=f"at most {MAX_UNIT_IDS}"
            )
        if request.ByteSize() < LARGE_PAYLOAD:
            return call_from_proto(request)
        return await self.operations.executors.io(call_from_proto, request)

    def answer(self, run: Run, future_id: str = "") -> training_pb2.Submitted:
        """Where the run stands, for the client's journal."""
        return submission_to_proto(
            Submission(
                future_id=future_id,
                server_epoch=self.operations.epoch,
                expected_seq=run.lane.expected,
                durable_seq=run.durable_seq,
            )
        )

"""What the servicers of ordered calls share: from a request to its place in the run's lane."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tg_tinker.errors import InvalidRequestError
from tg_tinker.proto.v1 import training_pb2
from tg_tinker.wire.call_messages import call_from_proto
from tg_tinker.wire.calls import Call as OrderedCall
from tg_tinker.wire.operations import Submission, submission_to_proto
from tg_tinker_server.rpc.endpoint import Call
from tg_tinker_server.service.dispatch import Dispatch
from tg_tinker_server.service.operations import OperationService
from tg_tinker_server.service.run import Run
from tg_tinker_server.service.runs import RunRegistry

MAX_UNIT_IDS = 1 << 16


@dataclass(frozen=True, slots=True)
class Submitting:
    """Puts the calls of requests into lanes."""

    registry: RunRegistry
    operations: OperationService
    dispatch: Dispatch

    async def submit(self, call: Call, request: Any, name: str, *, effect: bool) -> training_pb2.Submitted:
        """Queue a request's call at its position; answer at once."""
        run = await self.registry.get(call.caller, request.key.run_id)

        def read() -> OrderedCall:
            units = getattr(request, "privacy_unit_ids", ())
            if len(units) > MAX_UNIT_IDS:
                raise InvalidRequestError(
                    f"{len(units)} privacy_unit_ids", field="privacy_unit_ids", constraint=f"at most {MAX_UNIT_IDS}"
                )
            return call_from_proto(request)

        operation = await self.dispatch.submit(
            call.caller, run, request.key.seq, name, call.payload, read, effect=effect
        )
        return self.answer(run, operation.future_id)

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

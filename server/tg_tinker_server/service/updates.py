"""add_updates: rows computed elsewhere, each a contribution of its privacy unit, join the logical batch."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import ForwardBackwardOutput
from tg_tinker.wire.calls import Updates
from tg_tinker_server.service.executors import Executors
from tg_tinker_server.service.lanes import Operation
from tg_tinker_server.service.pass_checks import refuse_if_drawn_here, refuse_too_many
from tg_tinker_server.service.run import Run
from tg_tinker_server.service.training import TrainingService


@dataclass(frozen=True, slots=True)
class UpdatesService:
    """The third operation that training is made of, for runs on plain vectors. It runs inside the run's lane."""

    training: TrainingService
    executors: Executors

    async def add_updates(self, run: Run, operation: Operation, request: Updates) -> ForwardBackwardOutput:
        """Add rows to the logical batch, under all the rules of a pass; nothing is charged until it is stepped.

        Raises:
            InvalidRequestError: the rows do not fit the run, or a unit is in the logical batch already.
            DPBudgetExceededError: the step could not be paid for.
        """
        run.require_active()
        refuse_if_drawn_here(run, field="vectors")
        rows = len(request.vectors_UP)
        refuse_too_many(rows, self.training.limits, "add_updates", field="vectors")
        if len(request.units) != rows:
            raise InvalidRequestError(
                f"{len(request.units)} privacy_unit_ids for {rows} rows",
                field="privacy_unit_ids",
                constraint="one per row",
            )
        if run.private is not None:
            await self.training.refuse_if_unaffordable(run, run.private)
        digest = await self.executors.io(request.digest)
        operation.ensure_wanted()
        result = await self.executors.compute(run.session.contribute, request.vectors_UP, request.units)
        describing = asyncio.ensure_future(self.training.describe(run, digest, result, operation))
        try:
            await self.training.accumulate(run, operation, result)
            return await describing
        finally:
            describing.cancel()

"""From a call to its place in the run's lane: the one way, whichever door it came through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from tg_tinker.errors import FutureCancelledError
from tg_tinker.wire.calls import OPERATION, Call, Generate, Load, LossPass, Pass, Save, Step, Updates
from tg_tinker_server.service.caller import Caller
from tg_tinker_server.service.lanes import Operation
from tg_tinker_server.service.operations import LARGE_PAYLOAD, OperationService
from tg_tinker_server.service.run import Run
from tg_tinker_server.service.sampling import SamplingService
from tg_tinker_server.service.states import StateService
from tg_tinker_server.service.steps import StepService
from tg_tinker_server.service.training import TrainingService
from tg_tinker_server.service.units import PassWatch, named
from tg_tinker_server.service.updates import UpdatesService

_INTO_THE_BATCH = ("forward_backward", "add_updates")


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Puts calls into lanes. A call is read inside the lane, so that a bad one still takes its turn.

    What a key's policy says of units and of losses holds here, for every door.
    """

    operations: OperationService
    training: TrainingService
    steps: StepService
    updates: UpdatesService
    states: StateService
    sampling: SamplingService
    watch: PassWatch = field(default_factory=PassWatch)

    async def submit(
        self,
        caller: Caller,
        run: Run,
        seq: int,
        name: str,
        payload: bytes,
        read: Callable[[], Call],
        *,
        effect: bool,
        finds_units: bool = False,
    ) -> Operation:
        """Queue a call at its position, or find the operation that stands there; answers at once.

        Args:
            name: of the operation, as in ``wire.calls.OPERATION``.
            payload: what identifies the call: another one at the same position is refused.
            read: makes the call when its turn has come, off the event loop where the payload is large. What it
                raises is the outcome.
            effect: whether it may change weights or the pending gradient.
            finds_units: the door has no privacy_unit_ids: whose each datum is, is found in the datums, and losses
                that the caller computed over several are refused without its word.

        Raises:
            InvalidRequestError: the position is taken by another request, or is not a position.
            RateLimitedError: the queue is full.
        """

        async def turn(operation: Operation) -> Any:
            try:
                large = len(payload) >= LARGE_PAYLOAD
                call = await self.operations.executors.io(read) if large else read()
                if OPERATION[type(call)] != name:
                    raise TypeError(f"a {type(call).__name__} is no {name}")
                if isinstance(call, LossPass):
                    args = (caller, run, call, finds_units)
                    call = await self.operations.executors.io(self._judged, *args) if large else self._judged(*args)
                return await self._work(caller, run, operation, call)
            except FutureCancelledError:
                raise  # left no effect
            except Exception as e:
                if effect and name in _INTO_THE_BATCH:
                    self.training.poison(run, e)
                raise

        return await self.operations.submit(run, seq, name, payload, turn, effect=effect, actor=caller.key_id)

    def _judged(self, caller: Caller, run: Run, call: LossPass, finds_units: bool) -> LossPass:
        """With whose each datum is, and whether a loss over several of them was computed elsewhere.

        An owner that names units itself is believed in that, too: tg_tinker computes losses unit by unit.
        """
        call = named(run, call, policy=caller.policy, finds_units=finds_units)
        if caller.policy is None and not finds_units:
            return call
        return replace(call, coupling=self.watch.coupling_of(run, call))

    async def _work(self, caller: Caller, run: Run, operation: Operation, call: Call) -> Any:
        if caller.policy is not None and isinstance(call, Pass | Updates):
            caller.policy.refuse_batches(call.units)
        match call:
            case Pass() | LossPass():
                return await self.training.forward_backward(run, operation, call)
            case Updates():
                return await self.updates.add_updates(run, operation, call)
            case Step():
                try:
                    return await self.steps.optim_step(run, operation, call)
                finally:
                    run.restored = False
            case Save():
                return await self.states.save(run, operation, call)
            case Load():
                return await self.states.load(caller, run, operation, call)
            case Generate():
                return await self.sampling.sample(run, operation, call)

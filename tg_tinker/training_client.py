"""TrainingClient: trains, samples and checkpoints one run on the server."""

from __future__ import annotations

import asyncio
from types import TracebackType

from tg_tinker._training.checkpoints import Checkpoints
from tg_tinker._training.custom_loss import CustomLoss
from tg_tinker._training.generation import Generation
from tg_tinker._training.passes import Batch
from tg_tinker.types.run import UnloadModelResponse
from tg_tinker.wire import requests


class TrainingClient(CustomLoss, Generation, Checkpoints):
    """One run. Made by ``ServiceClient``; threads may share it.

    Calls are executed in the order they were made. ``forward_backward`` and ``optim_step`` return at once
    with a FutureHandle; ``sample``, ``save_state`` and ``load_state`` wait for their result.
    """

    def unload_model(self) -> UnloadModelResponse:
        """Free the run's memory on the server and complete it; its checkpoints stay. Repeating it changes nothing.

        Gradients that wait for their step are dropped; what was spent stays spent. Further calls of this client are
        refused with a ResourceNotFoundError.
        """
        self._transport.call(requests.unload_run(self.id))
        self._unloaded = True
        return UnloadModelResponse(model_id=self.id)

    async def unload_model_async(self) -> UnloadModelResponse:
        """Like ``unload_model``."""
        await asyncio.wrap_future(self._transport.send(requests.unload_run(self.id)))
        self._unloaded = True
        return UnloadModelResponse(model_id=self.id)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(wait_s=60.0 if error is None else 0.0)


__all__ = ["Batch", "TrainingClient"]

"""Non-private LoRA as people run it today: PEFT, the model's own loss, AdamW. Every ratio is to this."""

from __future__ import annotations

from benchmarks.engine_peers.contender import PeftModel, Recipe, Weights, make_optimizer
from benchmarks.engine_peers.shapes import Shape


class PlainPeft:
    """``model(labels=...)``, ``backward``, ``step``. Its loss is the mean over a batch's targets."""

    def __init__(self, shape: Shape, recipe: Recipe) -> None:
        self._peft = PeftModel(shape, recipe)
        self._optimizer = make_optimizer(self._peft.parameters, recipe)

    def step(self) -> None:
        """See ``Contender``."""
        batches = self._peft.batches
        for batch in batches:
            (self._peft.model(**batch, use_cache=False).loss / len(batches)).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def weights(self) -> Weights:
        """See ``Contender``."""
        return self._peft.weights()

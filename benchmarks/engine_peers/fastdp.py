"""FastDP (github.com/awslabs/fast-differential-privacy), if its module is importable; it is on no package index.

One backward pass with book-keeping. Its per-record clip is Abadi's, as everyone else's here; its default, automatic
clipping, would be another algorithm. Its trick of leaving the gradients of all layers but the first to its own hooks
is on.
"""

from __future__ import annotations

import contextlib
import io

from fastDP import PrivacyEngine

from benchmarks.engine_peers.contender import PeftModel, Recipe, Weights, make_optimizer, record_losses
from benchmarks.engine_peers.shapes import Shape

SAMPLE_SIZE = 100_000
"""Of an imagined dataset; it only enters FastDP's accounting, which is not part of the step."""


class FastDP:
    """``fastDP.PrivacyEngine`` attached to torch's optimizer."""

    def __init__(self, shape: Shape, recipe: Recipe) -> None:
        self._peft = PeftModel(shape, recipe)
        self._optimizer = make_optimizer(self._peft.parameters, recipe)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its settings
            engine = PrivacyEngine(
                self._peft.model,
                batch_size=shape.expected_batch_size,
                sample_size=SAMPLE_SIZE,
                num_steps=100,
                noise_multiplier=recipe.noise_multiplier,
                max_grad_norm=recipe.max_grad_norm,
                clipping_fn="Abadi",
                clipping_mode="MixOpt",
                loss_reduction="mean",
                origin_params=["layers.0."],
            )
        engine.attach(self._optimizer)

    def step(self) -> None:
        """See ``Contender``."""
        for batch in self._peft.batches:
            logits = self._peft.model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
            ).logits
            record_losses(logits, batch["labels"]).mean().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def weights(self) -> Weights:
        """See ``Contender``."""
        return self._peft.weights()

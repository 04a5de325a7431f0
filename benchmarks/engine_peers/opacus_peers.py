"""Opacus's three ways to a private step: hooks, functorch, ghost clipping.

Micro-batches are folded as its BatchMemoryManager does, with ``signal_skip_step``: plain accumulation keeps every
per-sample gradient with hooks and loses all but the last micro-batch with ghost clipping. Noise is torch's own.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

from benchmarks.engine_peers.contender import PeftModel, Recipe, Weights, make_optimizer, record_losses
from benchmarks.engine_peers.shapes import Shape

warnings.filterwarnings("ignore", message="Full backward hook is firing")


class _OpacusPeer:
    """What the three share: the folded step."""

    def __init__(self, shape: Shape, recipe: Recipe) -> None:
        self._peft = PeftModel(shape, recipe)
        self._dp_arguments = {
            "noise_multiplier": recipe.noise_multiplier,
            "max_grad_norm": recipe.max_grad_norm,
            "expected_batch_size": shape.expected_batch_size,
        }
        self._inner = make_optimizer(self._peft.parameters, recipe)
        self._module: Any
        self._optimizer: Any

    def step(self) -> None:
        """See ``Contender``."""
        last = len(self._peft.batches) - 1
        for index, batch in enumerate(self._peft.batches):
            self._optimizer.signal_skip_step(do_skip=index < last)
            self._backward(batch)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)

    def _backward(self, batch: dict[str, torch.Tensor]) -> None:
        raise NotImplementedError

    def _logits(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        logits: torch.Tensor = self._module(**inputs, use_cache=False).logits
        return logits

    def weights(self) -> Weights:
        """See ``Contender``."""
        return self._peft.weights()


class OpacusHooks(_OpacusPeer):
    """``GradSampleModule``: per-sample gradients from hooks on every trainable layer."""

    functorch = False

    def __init__(self, shape: Shape, recipe: Recipe) -> None:
        super().__init__(shape, recipe)
        self._module = GradSampleModule(self._peft.model, force_functorch=self.functorch)
        self._optimizer = DPOptimizer(self._inner, **self._dp_arguments)

    def _backward(self, batch: dict[str, torch.Tensor]) -> None:
        record_losses(self._logits(batch), batch["labels"]).mean().backward()


class OpacusFunctorch(OpacusHooks):
    """The same with ``force_functorch=True``: each layer's gradient is a vmapped function."""

    functorch = True


class _RecordLoss:
    """A criterion whose ``reduction`` Opacus switches to "none" before it calls."""

    reduction = "mean"

    def __call__(self, logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        return record_losses(logits_BTV, labels_BT)


class OpacusGhost(_OpacusPeer):
    """Ghost clipping: norms from a first backward pass, the clipped sum from a second."""

    def __init__(self, shape: Shape, recipe: Recipe) -> None:
        super().__init__(shape, recipe)
        self._module = GradSampleModuleFastGradientClipping(
            self._peft.model, max_grad_norm=recipe.max_grad_norm, use_ghost_clipping=True
        )
        self._optimizer = DPOptimizerFastGradientClipping(self._inner, **self._dp_arguments)
        self._loss = DPLossFastGradientClipping(self._module, self._optimizer, _RecordLoss())

    def _backward(self, batch: dict[str, torch.Tensor]) -> None:
        self._loss(self._logits(batch), batch["labels"]).backward()
